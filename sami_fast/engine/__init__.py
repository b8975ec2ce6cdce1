"""How a run is carried out: DeepSpeed's engines, whole tensors out of what ZeRO splits, compiled parts, checkpoints, the run's folder."""

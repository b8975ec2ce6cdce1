"""How a run is carried out: by one process or through DeepSpeed, compiled parts, checkpoints, monitors, the run's folder."""

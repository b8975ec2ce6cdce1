"""What latents mean, in numbers. One metric per file; plain numpy arrays in, plain numbers out, but for `bound`, `scale_profile` and
`guidance`, which run the networks.

    factors with classes     mig, dci, sap, interventions (FactorVAE and BetaVAE scores), modularity (and explicitness), irs
    factors with values      identifiability (linear and nonlinear R2, MCC), sap
    binary attributes        attributes (AUROC, TAD, latent quality)
    codes alone              latents (rates), total_correlation
    clips                    straightness
    sets and pairs of images image_sets (FID, KID, precision and recall), image_pairs (MSE, PSNR, SSIM, LPIPS)

Codes are [N, D], factors [N, K], one row per image. Factor metrics are blind to the scale of a code: give them *sampled* codes
z ~ q(z|x), or live dimensions only. Those that learn take separate test rows; disentanglement_lib, whose defaults these are, draws
10 000 and 5 000 images with replacement. Scores of other definitions, sample sizes or factors are not comparable.
"""

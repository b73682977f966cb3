"""The settings whose steps a page can show: for each method the rows of its paper's tables, by what they change."""

# What the demo recipes have otherwise than the paper; a page shows the paper's method, at the demo's sizes.
PAPER = {"cmae": dict(official_scale=False), "conmim": dict(dictionary="image", mask_cell=2)}

SWITCHES: dict[str, list[tuple[str, dict]]] = {
    "mae": [
        ("half of the patches hidden (Fig. 5)", dict(mask_ratio=0.5)),
        ("a decoder of one block (Table 1a)", dict(decoder_depth=1)),
        ("a narrower decoder (Table 1b)", dict(decoder_width=32)),
        ("raw pixels as target (Table 1d)", dict(norm_pixels=False)),
    ],
    "cmae": [
        ("no contrast, λ_c = 0 (§4.4)", dict(lambda_c=0.0)),
        ("no feature decoder (Table 4a, 4c)", dict(feature_decoder_depth=0)),
        ("no feature decoder, random crops (Table 4a, target whole)", dict(feature_decoder_depth=0, pixel_shift=False)),
        ("random crops, no shift (Table 6)", dict(pixel_shift=False)),
        ("equal views, no colour (Table 4b, if not MAE)", dict(shift_range="0", target_color=False)),
        ("no colour on the target (Table 4b)", dict(target_color=False)),
        ("large shifts, 48-63 (Table 6)", dict(shift_range="48-63")),
        ("the feature decoder shares weights (Table 4c)", dict(share_decoder=True)),
        ("target view masked, 75 % (Table 4e)", dict(target_mask_ratio=0.75)),
        ("BYOL's loss in place of InfoNCE (§4.4)", dict(contrast="byol")),
        ("L_c times 2τ, as in the official code", dict(official_scale=True)),
    ],
    "cmae_loc": [
        ("plain crops, no boxes (§3.2)", dict(crop_by="none")),
        ("boxes by features (§3.2)", dict(crop_by="features")),
        ("a decoder of MLPs (§3.5)", dict(decoder="mlp")),
        ("a decoder of convolutions (§3.5)", dict(decoder="conv")),
        ("no contrast", dict(lambda_ctr=0.0)),
        ("no location task", dict(lambda_loc=0.0)),
        ("Eq. (5) as printed, a sum over places", dict(location_mean=False)),
        ("the location task without positions", dict(withhold_positions=True)),
    ],
    "cae": [
        ("no alignment (Table 2)", dict(lambda_z=0.0)),
        ("a linear layer as decoder, no alignment (Table 2)", dict(decoder_depth=0, lambda_z=0.0)),
        ("pixels in place of tokens (Fig. 4)", dict(target="pixels")),
        ("the official code's residual", dict(official_residual=True)),
    ],
    "conmim": [
        ("nothing masked (Table 4)", dict(masking="none")),
        ("whole images contrasted (Table 4)", dict(masking="none", contrast="instance")),
        ("keys of all images (Table 5)", dict(dictionary="batch")),
        ("like keys left out (Table 5)", dict(filter_above=0.1)),
        ("no slow copy (Table 6)", dict(slow=False)),
        ("equal views (Table 6)", dict(augmentation="basic")),
        ("strong augmentation of both (Table 6)", dict(augmentation="strong")),
        ("views switched (Table 6)", dict(augmentation="switched")),
        ("blocks masked, 60 % (Table 7)", dict(masking="block", mask_ratio=0.6)),
        ("τ = 0.2 (Table 8)", dict(tau=0.2)),
        ("cells of one patch (Table 10)", dict(mask_cell=1)),
    ],
    "lcmae": [
        ("(b): L_MAE alone (Table 1)", dict(cross_weight=0.0, in_weight=0.0)),
        ("(c): L_cross alone (Table 1)", dict(mae_weight=0.0, in_weight=0.0)),
        ("(d): L_in alone (Table 1)", dict(mae_weight=0.0, cross_weight=0.0)),
        ("(e): L_MAE and L_cross (Table 1)", dict(in_weight=0.0)),
        ("(f): L_MAE and L_in (Table 1)", dict(cross_weight=0.0)),
        ("(g): L_cross and L_in (Table 1)", dict(mae_weight=0.0)),
        ("a Gaussian mean as decoder (Table 2)", dict(cross_weight=0.0, in_weight=0.0, decoder="average")),
        ("a convolution as decoder (Table 2)", dict(cross_weight=0.0, in_weight=0.0, decoder="conv")),
        ("the projector reads tokens", dict(project="tokens")),
    ],
    "autoencoder": [
        ("blocks of one patch (Table 3)", dict(block=8)),
        ("blocks of five patches (Table 3)", dict(block=40)),
        ("raw pixels as target", dict(norm_pixels=False)),
    ],
    "dvae": [
        ("diversity beside the KL (CAE's code)", dict(diversity_weight=16.0)),
        ("the two finest resolutions too", dict(first_stride=1)),
    ],
}  # fmt: skip

"""The papers' claims that are tested here, the runs that they compare, and the rule of the verdict."""

from dataclasses import dataclass

# Runs that claims need beyond the cpu table: the method, what differs from its row there, what is measured.
VARIANTS = {
    "lcmae-cross": ("lcmae", "--mae-weight 0 --in-weight 0", "spread knn"),
    "lcmae-cross-in": ("lcmae", "--mae-weight 0", "spread knn"),
    "lcmae-cross-mae": ("lcmae", "--in-weight 0", "spread knn"),
    "autoencoder": ("autoencoder", "--block 8", "knn linear"),
    "mae-30": ("mae", "--mask-ratio 0.3", "attention"),
    "mae-60": ("mae", "--mask-ratio 0.6", "attention"),
    "mae-90": ("mae", "--mask-ratio 0.9", "attention"),
    "mae-deep": ("mae", "--decoder-depth 4", "positions"),
    "cae-pixels": ("cae", "--target pixels", "latents"),
    "cae-pixels-unaligned": ("cae", "--target pixels --lambda-z 0", "latents"),
    "conmim-unmasked": ("conmim", "--masking none", "linear finetune"),
    "conmim-no-ema": ("conmim", "--no-slow", "linear finetune"),
    "cmae-0": ("cmae", "--lambda-c 0", "linear finetune"),
    "cmae-2": ("cmae", "--lambda-c 2", "linear finetune"),
    "cmae-crops": ("cmae", "--no-pixel-shift", "linear finetune"),
    "cmae-far": ("cmae", "--shift-range 48-63", "linear finetune"),
    "cmae-no-decoder": ("cmae", "--feature-decoder-depth 0", "linear finetune"),
    "cmae-target-75": ("cmae", "--target-mask-ratio 0.75", "linear finetune"),
}


@dataclass(frozen=True)
class Claim:
    paper: str
    where: str
    statement: str
    reported: str  # by the paper, in the order of `order`; of CMAE and ConMIM: ImageNet, fine-tuned
    measure: str  # "linear.top1", as `value` knows it
    runs: str  # result files, from the one that the paper finds lowest to the one that it finds highest

    @property
    def order(self) -> list[str]:
        return self.runs.split(" < ")


TOP1 = "finetune.top1"
CLAIMS = [
    Claim("LC-MAE", "Table 1", "L_cross alone collapses; L_in prevents it (v's spread over images)",
          "collapse < 82.5", "spread.deviation", "claims/lcmae-cross < claims/lcmae-cross-in"),
    Claim("LC-MAE", "Table 1", "L_cross alone collapses; L_MAE prevents it (v's spread over images)",
          "collapse < 83.1", "spread.deviation", "claims/lcmae-cross < claims/lcmae-cross-mae"),
    Claim("LC-MAE", "Table 3", "a plain autoencoder probes far below MAE",
          "5.7 < 55.4", "linear.top1", "claims/autoencoder < cpu/mae"),
    Claim("LC-MAE", "Figure 6", "attention distance (pixels) grows with the mask ratio (.3, .6, .75, .9)",
          "rises", "attention.distance", "claims/mae-30 < claims/mae-60 < cpu/mae < claims/mae-90"),
    Claim("LC-MAE", "Figure 2",
          "the decoder's first layer attends by position, alike in all images; later layers less so",
          "later < first, up to 0.9", "positions.later positions.first", "claims/mae-deep < claims/mae-deep"),
    Claim("CAE", "Figure 4",
          "with alignment, the decoder reads the encoder's latents without the regressor (squared error)",
          "images < noise", "latents.error", "claims/cae-pixels < claims/cae-pixels-unaligned"),
    Claim("CAE", "Table 1", "linear probing is far below attentive probing",
          "64.1 < 73.8", "linear-paper.top1 attentive.top1", "cpu/cae < cpu/cae"),
    Claim("ConMIM", "Table 4", "without masking, the task is trivial (share of patches that are found)",
          "masked < unmasked", "loss.accuracy", "cpu/conmim < claims/conmim-unmasked"),
    Claim("ConMIM", "Table 4", "without masking, little is learned",
          "fails < 83.51", TOP1, "claims/conmim-unmasked < cpu/conmim"),
    Claim("ConMIM", "Table 6", "without the slow copy (EMA), less is learned",
          "81.53 < 83.51", TOP1, "claims/conmim-no-ema < cpu/conmim"),
    Claim("CMAE", "Table 4a, 4d", "contrast helps: λ_c 1 is better than 0",
          "82.9 < 83.8", TOP1, "claims/cmae-0 < cpu/cmae"),
    Claim("CMAE", "Table 4d", "too much contrast harms: λ_c 2 is worse than 1",
          "83.2 < 83.8", TOP1, "claims/cmae-2 < cpu/cmae"),
    Claim("CMAE", "Table 4b, 6", "random crops are worse than pixel shifts",
          "83.29 < 83.82", TOP1, "claims/cmae-crops < cpu/cmae"),
    Claim("CMAE", "Table 6", "large shifts (48-63) are worse than small ones (0-31)",
          "83.48 < 83.82", TOP1, "claims/cmae-far < cpu/cmae"),
    Claim("CMAE", "Table 4c", "a feature decoder of 2 blocks is better than none",
          "83.6 < 83.8", TOP1, "claims/cmae-no-decoder < cpu/cmae"),
    Claim("CMAE", "Table 4e", "masking .75 of the target branch is worse than masking nothing",
          "83.0 < 83.8", TOP1, "claims/cmae-target-75 < cpu/cmae"),
    Claim("CMAE", "Figure 6", "contrast makes classes evenly tight (deviation of the distances within a class)",
          ".0189 < .0371", "classes.intra_std", "cpu/cmae < cpu/mae"),
    Claim("CMAE", "Figure 6", "contrast moves classes apart (distance between their centres)",
          ".0309 < .0340", "classes.inter_mean", "cpu/mae < cpu/cmae"),
    Claim("The other CMAE", "Table 1", "it is better than MAE (here on ten classes of Tiny-ImageNet)",
          "62.95 < 65.84", TOP1, "cpu/mae < cpu/cmae_loc"),
    Claim("The other CMAE", "Table 1", "it is better than MAE (on all of Tiny-ImageNet, which needs a GPU)",
          "62.95 < 65.84", TOP1, "gpu/mae < gpu/cmae_loc"),
]  # fmt: skip


def sides(claim: Claim) -> list[str]:
    """What is compared, as `values` takes it."""
    measures = claim.measure.split()
    measures = measures if len(measures) > 1 else measures * len(claim.order)
    return [f"{name} {measure}" for name, measure in zip(claim.order, measures, strict=True)]


def verdict(low: list[float], high: list[float]) -> str:
    """Of what the paper finds lower, and of what it finds higher: every seed of the one beyond every seed of the other.

    That takes no model of the noise. Chance alone does it once in (n + m choose n) times: once in 20 of 3 and 3.
    """
    if not low or not high:
        return "not run"
    if min(len(low), len(high)) < 3:
        return "not judged: fewer than three seeds"
    return "shown" if min(high) > max(low) else "contradicted" if max(high) < min(low) else "not shown at this scale"

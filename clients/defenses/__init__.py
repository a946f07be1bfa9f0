"""Defenses: one paper per file, pure torch. Deleting a file and its line here removes the defense."""

DEFENSES: dict[str, str] = {
    "none": "fedattack.types:Defense",
    "gaussian-noise": "clients.defenses.gaussian_noise:GaussianNoise",
    "norm-clipping": "clients.defenses.norm_clipping:NormClipping",
}

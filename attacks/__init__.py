"""Attack plugins: one paper per file. Deleting a file and its line here removes the attack.

Files that have no line here are helpers, imported by those that use them; none of them imports an attack.
"""

ATTACKS: dict[str, str] = {
    "linear-leak": "attacks.linear_leak:LinearLeak",
    "dlg": "attacks.dlg:DLG",
    "idlg": "attacks.idlg:IDLG",
    "inverting-gradients": "attacks.inverting_gradients:InvertingGradients",
    "gidm": "attacks.gidm:GIDM",
    "generative": "attacks.gidm:Generative",
    "dlg-dm": "attacks.gidm_baselines:DLGdm",
    "invg-dm": "attacks.gidm_baselines:InvGdm",
    "gg-cdm": "attacks.gg_cdm:GGCDM",
    "user-level": "attacks.user_level:UserLevel",
    "timestep-leak": "attacks.timestep_leak:TimestepLeak",
    "second-order": "attacks.second_order:SecondOrder",
    "gaussian-map": "attacks.gaussian_map:GaussianMAP",
    "cocktail-party": "attacks.cocktail_party:CocktailParty",
    "spear": "attacks.spear:Spear",
    "unmixing": "attacks.unmixing:Unmixing",
    "r-conv": "attacks.r_conv:RConv",
    "r-gap": "attacks.r_gap:RGAP",
}

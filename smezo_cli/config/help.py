"""Write the text of `smezo train --help`: groups, settings and their values."""

import string
import textwrap

import yaml
from omegaconf import OmegaConf

from smezo_cli.config.command_line import Request
from smezo_cli.config.compose import every
from smezo_cli.config.composer import Composer
from smezo_cli.config.fixed import CONF_DIR


def help(request: Request) -> str:
    """Return the help text: the choices of each group, and conf/train.yaml or what KEY=VALUE give.

    Groups are read from the files, because Hydra takes seconds to list a hundred of them.
    """
    roots = request.search.roots
    node = yaml.safe_load((CONF_DIR / "hydra" / "smezo.yaml").read_text(encoding="utf-8"))
    groups = []
    for group in sorted({d.name for root in roots for d in root.iterdir() if d.is_dir()}):
        if group not in ("hydra", "recipe", "table"):
            names = sorted({f.stem for root in roots for f in (root / group).glob("*.yaml")})
            if not names:  # another folder beside those of settings
                continue
            line = f"{group}: {', '.join(names)}"
            groups.append(textwrap.fill(line, 110, subsequent_indent=" " * (len(group) + 2)))
    if request.overrides:
        with Composer(request.search) as composer:
            cfg = next(every(composer, request)).cfg
        settings = OmegaConf.to_yaml(cfg, resolve="--resolve" in request.flags)
    else:
        file = request.search.primary or CONF_DIR / "train.yaml"
        text = file.read_text(encoding="utf-8")
        settings = text.partition("hydra: smezo\n\n")[2] or text
    return string.Template(node["help"]["template"]).substitute(
        APP_CONFIG_GROUPS="\n".join(groups), CONFIG=settings
    )

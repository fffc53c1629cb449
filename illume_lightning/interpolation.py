"""What `${}` may stand for in a YAML: other values of it, and nothing of the machine."""

from omegaconf import OmegaConf


def forbid_environment() -> None:
    """From now on refuse `${oc.env:NAME}`.

    It would write keys and passwords into a run's config.yaml, which is shared, and a run would not be what its files
    say.
    """
    OmegaConf.register_resolver("oc.env", _refuse, replace=True)


def _refuse(*name: str) -> None:
    raise ValueError(
        f"${{oc.env:{','.join(name)}}} is not resolved, since environment variables would be saved with the run: "
        "write the value down, or give it as a flag"
    )

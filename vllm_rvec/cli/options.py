"""Options that `serve` and `route` share, word for word."""

from typing import Annotated

import typer

__all__ = ["AdminKey", "ApiKey", "AsJson", "Host", "Insecure", "Port"]

Host = Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")]
Port = Annotated[
    int | None, typer.Option(help="Port to listen on; 0 takes a free one.", show_default="8000")
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="VLLM_RVEC_API_KEY",
        show_envvar=True,
        help="Key that clients must send. Better in the environment: others see this line.",
    ),
]
AdminKey = Annotated[
    str | None,
    typer.Option(
        envvar="VLLM_RVEC_ADMIN_KEY",
        show_envvar=True,
        help="Key for changing alphas and weights while it serves; without one, nobody can.",
    ),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Answer beyond this machine without any key.")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print address and names as JSON once all is ready.")
]

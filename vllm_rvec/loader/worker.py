"""What each of vLLM's workers does for a live change of alpha: `--worker-extension-cls`.

vLLM makes this class a base of its own worker's, so that `collective_rpc` finds the methods on
every rank, on every node. `live` calls them, in the order: note, check, check again, reload.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm_rvec.checkpoint.stamps import FileStamps
from vllm_rvec.errors import AlphaChangeFailedError, RvecError
from vllm_rvec.loader.config import LoaderConfig
from vllm_rvec.loader.fetching import find_vector, target_file
from vllm_rvec.loader.kv_stores import foreign_connectors
from vllm_rvec.loader.vllm_api import get_model_loader, set_current_vllm_config

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

    from vllm_rvec.loader.vllm_api import VllmConfig

__all__ = ["RvecWorker"]

# As in `model_loader`: vLLM gives handlers to loggers under its own name only.
logger = logging.getLogger("vllm.rvec")


class RvecWorker:
    """Methods of ours on vLLM's worker. All names begin with `rvec`: others are vLLM's."""

    def rvec_note_files(self) -> None:
        """Note how the files are that this worker has just been loaded from."""
        worker: Any = self
        worker.rvec_files = FileStamps.take(_stored_folders(worker.vllm_config))

    def rvec_check(self) -> list[str]:
        """Say what would make a reload fail, or wrong. Touches nothing."""
        worker: Any = self
        config, model = worker.vllm_config, worker.model_runner.get_model()
        return [*_unfit(config, model), *_file_problems(config, worker.rvec_files)]

    def rvec_reload(self, extra: dict[str, Any]) -> int:
        """Load all weights anew, in place, by vLLM's own reload.

        Args:
            extra: The new `model_loader_extra_config`. It stays: a later wake from level-2 sleep
                reads it too.

        Returns:
            Sums computed straight into a parameter; none at alpha 0.

        Raises:
            AlphaChangeFailedError: What `rvec_check` finds was not there a moment ago.
        """
        worker: Any = self
        if problems := self.rvec_check():  # of all data-parallel engines, only one was heard
            raise AlphaChangeFailedError("this rank can't reload", problems=problems)
        worker.update_config({"load_config": {"model_loader_extra_config": extra}})
        config, model = worker.vllm_config, worker.model_runner.get_model()
        with set_current_vllm_config(config):
            loader = get_model_loader(config.load_config)
            weights = loader.get_all_weights(config.model_config, model)
        worker.reload_weights(weights_iterator=weights)
        _finish_tied(model)
        copies: int = loader.stream.ledger.copies
        return copies


def _finish_tied(model: torch.nn.Module) -> None:
    """Have layers that share another's weight make their kernels' copies of it anew.

    vLLM's reload does that only for the one whose weight is loaded (its "Limitations", 2). On a CPU
    a tied output head would go on with the old weights.
    """
    owner: dict[int, torch.nn.Module] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if owner.setdefault(id(parameter), module) is module:
                continue
            method = getattr(module, "quant_method", None)
            if method is not None:
                method.process_weights_after_loading(module)


def _unfit(config: VllmConfig, model: torch.nn.Module) -> Iterator[str]:
    """Say what of this engine vLLM's reload is not made for."""
    if LoaderConfig.split(config.load_config.model_loader_extra_config)[0].mode == "dial":
        yield "it is a dial: its vectors are beside its weights, and each request says its alpha"
    if hasattr(model, "process_weights_after_loading"):
        yield (
            f"the model class {type(model).__name__} finishes its load by a step of its own, which "
            "a reload does not repeat"
        )
    offload = config.offload_config
    if offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0:
        yield "weights are offloaded to the host, where a reload does not find them"
    if config.parallel_config.enable_eplb:
        yield "experts are moved between ranks (--enable-eplb), which a reload does not know of"
    if foreign := foreign_connectors(config.kv_transfer_config):
        yield f"{' and '.join(foreign)} may keep keys and values of the old alpha"


def _file_problems(config: VllmConfig, files: FileStamps) -> list[str]:
    if problems := files.problems():
        return problems
    try:
        # What a URL or a Hub id names may be another vector by now.
        folders = _vector_folders(config)
    except RvecError as exc:
        return [exc.what]
    return [
        f"{folder}: another vector than the one that was loaded"
        for folder in folders
        if folder not in files.folders
    ]


def _stored_folders(config: VllmConfig) -> list[Path]:
    folders = _vector_folders(config)
    if (target := _target_folder(config.model_config)) is not None:
        folders.append(target)
    return folders


def _vector_folders(config: VllmConfig) -> list[Path]:
    ours, _ = LoaderConfig.split(config.load_config.model_loader_extra_config)
    return [find_vector(vector.path).folder for vector in ours.recipe]


def _target_folder(model_config: Any) -> Path | None:
    """The target's folder, also in the Hub's cache; None for what vLLM streams from elsewhere."""
    found = target_file(model_config, "config.json")
    return None if found is None else found.parent

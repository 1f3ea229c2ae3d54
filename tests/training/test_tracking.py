"""Weights & Biases, with the real library."""

import json
import socket
import struct
import time
from pathlib import Path

import pytest
from wandb.proto import wandb_internal_pb2

from mtl.cli import main


def records(folder: Path) -> list[wandb_internal_pb2.Record]:
    """Read back what W&B would upload: protocol buffers in LevelDB's log format, after a header of 7 bytes.

    The log consists of blocks of 32 KiB, of chunks with a header of their own: checksum, length and type (1 whole,
    2 first, 3 middle, 4 last). The end of a block too short for a header is padding.
    """
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    # W&B's own process may still be writing when a run has ended.
    deadline = time.monotonic() + 20
    while not (found := _whole_records(path.read_bytes())) or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, "the last record is not there"
        time.sleep(0.1)
    return found


def _whole_records(data: bytes) -> list[wandb_internal_pb2.Record]:
    position, content, found = 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):
            break
        content += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record.FromString(content))
            content = b""
    return found


def train(tiny: list[str], *words: str) -> int:
    flags = [*tiny, "--logger", "wandb", "--max-steps", "10", "--name", "run", *words]
    return main(["train", *flags], program="train.py")


def test_offline_without_a_key_and_never_a_prompt(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked something"))
    assert train(tiny) == 0
    folder = tmp_path / "runs" / "run"
    history: dict[str, str] = {}
    summary: dict[str, str] = {}
    configuration: dict[str, str] = {}
    for record in records(folder):
        history |= {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        summary |= {"/".join(i.nested_key) or i.key: i.value_json for i in record.summary.update}
        configuration |= {i.key: i.value_json for i in record.run.config.update}
    assert {"depth/abs_rel", "segmentation/miou", "train/loss", "train/weight/depth", "gain"} <= history.keys()
    assert "best/depth/abs_rel" in summary
    assert json.loads(configuration["task"]) == ["segmentation", "depth"]
    masks = json.loads(history["segmentation/predictions/all_masks"])
    assert len(masks) == 4 and all(mask.keys() == {"prediction", "ground_truth"} for mask in masks)
    assert any("doorway" in str(record.config) for record in records(folder)), "the masks' class names"
    (files,) = folder.glob("wandb/offline-run-*/files")
    assert all((files / kind["path"]).is_file() for mask in masks for kind in mask.values())
    assert list(files.glob("media/images/depth/*.png"))


def test_a_server_out_of_reach_is_a_warning(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert train(tiny) == 0
    assert "cannot be reached" in caplog.text
    assert (tmp_path / "runs" / "run" / "best.ckpt").exists()
    assert list((tmp_path / "runs" / "run").glob("wandb/offline-run-*"))


def test_a_resumed_run_keeps_its_id(tiny: list[str], tmp_path: Path) -> None:
    assert train(tiny) == 0
    identity = (tmp_path / "runs" / "run" / "wandb_id.txt").read_text()
    assert train(tiny, "--resume", "--max-steps", "12") == 0
    assert (tmp_path / "runs" / "run" / "wandb_id.txt").read_text() == identity
    assert len(list((tmp_path / "runs" / "run").glob(f"wandb/offline-run-*-{identity.strip()}"))) == 2

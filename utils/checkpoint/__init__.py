"""Files of weights: written whole or not at all, read without executing anything in them, checked key by key.

What network a file holds is told by `utils.networks`; `python -m utils.checkpoint` shows and converts files.
"""

from utils.checkpoint.files import (
    file_sha256,
    load_safetensors,
    load_torch,
    read_content,
    read_json,
    read_metadata,
    save_safetensors,
    save_torch,
    sync_folder,
    write_atomically,
    write_json,
    write_text,
)
from utils.checkpoint.folder import CheckpointFolder
from utils.checkpoint.state_dict import (
    PREFIXES,
    SCHEDULE_BUFFERS,
    check_finite,
    find_state_dict,
    load_network_file,
    load_state_dict_file,
    split_schedule,
    strict_load,
    weights_sha256,
    with_counters,
)

__all__ = [
    "PREFIXES",
    "SCHEDULE_BUFFERS",
    "CheckpointFolder",
    "check_finite",
    "file_sha256",
    "find_state_dict",
    "load_network_file",
    "load_safetensors",
    "load_state_dict_file",
    "load_torch",
    "read_content",
    "read_json",
    "read_metadata",
    "save_safetensors",
    "save_torch",
    "split_schedule",
    "strict_load",
    "sync_folder",
    "weights_sha256",
    "with_counters",
    "write_atomically",
    "write_json",
    "write_text",
]

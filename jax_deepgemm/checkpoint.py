"""FP8 checkpoints as DeepSeek-V3 publishes them, read and written without a cast.

A weight is two tensors of a safetensors file: `NAME.weight`, float8_e4m3fn [n, k], and
`NAME.weight_scale_inv`, float32 [ceil(n/128), ceil(k/128)]. In spite of its name the latter is what
values are multiplied with: the pair is a `QuantizedArray` as it lies in the file.

`Checkpoint` maps the files into memory and reads only the slices that a device holds, so that each
host touches its shards alone. It parses the format itself (a JSON header, then the bytes): the
safetensors package returns FP8 through PyTorch only, as NumPy has no such type of its own.

Scales as powers of two come in three guises: float32 numbers that happen to be powers of two, the
type F8_E8M0, and raw exponents in a U8 tensor. The first two say what they are; the third is read
only where the caller says so.
"""

import json
import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, NamedTuple, Self

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding
from numpy.typing import NDArray

from jax_deepgemm.quantized_array import QuantizedArray, block_shape, quantized_sharding
from jax_deepgemm.reference import BLOCK

WEIGHT = ".weight"
SCALE = ".weight_scale_inv"
INDEX = "model.safetensors.index.json"

ScaleFormat = Literal["float32", "ue8m0"]
Array = NDArray[Any]

# safetensors' names of types.
_TYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _TYPES.items()}
_METADATA = "__metadata__"  # a header's entry that is no tensor
_INCOMPLETE = ".incomplete"  # behind the name of a file that is being written
_SHARD = re.compile(rf"model-\d{{5,}}-of-\d{{5,}}\.safetensors({re.escape(_INCOMPLETE)})?")
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


class _Tensor(NamedTuple):
    """A tensor of a file, not read yet."""

    known_dtype: np.dtype[Any] | None  # None: a type that NumPy has no word for
    type_name: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def dtype(self) -> np.dtype[Any]:
        if self.known_dtype is None:
            raise TypeError(f"Checkpoint: {self.file} has a tensor of type {self.type_name}")
        return self.known_dtype


class Checkpoint:
    """The tensors of a folder of safetensors files, or of one file; read on demand.

    A context manager; arrays that were read stay valid after it is closed.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads the headers.

        Args:
            path: a .safetensors file, or a folder with model.safetensors.index.json, or with
                .safetensors files alone.

        Raises:
            FileNotFoundError: there is no such file, no safetensors file in the folder, or not one
                that the index names.
            ValueError: a file is not in the safetensors format, two hold the same tensor, one lacks
                a tensor that the index says it holds, or the folder was not saved to the end.
        """
        path = Path(path)
        self._tensors: dict[str, _Tensor] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for file, indexed in _files(path).items():
            for name, tensor in _read_header(file):
                if name in self._tensors:
                    raise ValueError(
                        f"Checkpoint: {name} is in {self._tensors[name].file} and in {file}"
                    )
                self._tensors[name] = tensor
            for name in indexed:
                if name not in self._tensors or self._tensors[name].file != file:
                    raise ValueError(
                        f"Checkpoint: {path / INDEX} says that {name} is in {file.name}, "
                        f"which does not hold it"
                    )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps the files; they are mapped again if need be."""
        while self._maps:
            self._maps.popitem()[1].close()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, in the files' order."""
        return tuple(self._tensors)

    def is_quantized(self, name: str) -> bool:
        """Whether there are `name`.weight and `name`.weight_scale_inv."""
        return name + WEIGHT in self._tensors and name + SCALE in self._tensors

    def read(self, name: str, index: Any = ...) -> Array:
        """Reads a tensor, or the part `index` of it, into memory; no type is converted.

        Args:
            name: the tensor's whole name.
            index: what NumPy indexes with; only what it selects is read.

        Raises:
            KeyError: there is no such tensor.
        """
        tensor = self._find("Checkpoint.read", name)
        view = np.frombuffer(
            self._map(tensor.file),
            dtype=tensor.dtype,
            count=math.prod(tensor.shape),
            offset=tensor.offset,
        )
        return np.array(view.reshape(tensor.shape)[index])

    def load(self, name: str, *, sharding: NamedSharding | None = None) -> jax.Array:
        """Loads a tensor that is not quantised, such as a norm's weight, as it is.

        Args:
            name: the tensor's whole name.
            sharding: where its parts go; None: all of it to the default device.

        Raises:
            KeyError: there is no such tensor.
            TypeError: it is of a 64-bit type, and jax_enable_x64 is off.
        """
        tensor = self._find("Checkpoint.load", name)
        # JAX would cut its values off to 32 bits in silence.
        if jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype:
            raise TypeError(
                f"Checkpoint.load: {name} must be of at most 32 bits where jax_enable_x64 is off, "
                f"got {tensor.dtype}{list(tensor.shape)}: read() returns it as a NumPy array"
            )
        return _make(tensor.shape, sharding, lambda index: self.read(name, index))

    def load_quantized(
        self,
        name: str | Sequence[str],
        *,
        sharding: NamedSharding | None = None,
        scale_format: ScaleFormat | None = None,
    ) -> QuantizedArray:
        """Loads a weight and its scales, [n, k], as the GEMMs take them.

        Args:
            name: the weight's name without ".weight"; or several, whose rows follow each other in
                the result, such as those of gate and up. All but the last have a multiple of 128
                rows then.
            sharding: of the values. Scales are split alike (`quantized_sharding`), and a device
                reads only its part of either. None: all of it to the default device.
            scale_format: None takes float32 scales, and F8_E8M0 ones, which become the float32
                numbers that they stand for. "ue8m0" says that all scales are powers of two: float32
                ones are then checked to be, and U8 tensors are raw exponents (2**(e - 127)).
                "float32" refuses all but float32 ones.

        Returns:
            QuantizedArray(float8_e4m3fn[n, k], float32[ceil(n/128), ceil(k/128)]).

        Raises:
            KeyError: a tensor is missing.
            TypeError: a weight is not F8_E4M3, or scales are of a type that scale_format does not
                allow.
            ValueError: shapes do not fit each other, a shard would cut a block, or scales are not
                what scale_format says.
        """
        names = [name] if isinstance(name, str) else list(name)
        if not names:
            raise ValueError("Checkpoint.load_quantized: name must not be empty")
        return self._load("Checkpoint.load_quantized", [names], sharding, scale_format, False)

    def load_experts(
        self,
        name: str | Sequence[str],
        experts: Sequence[int],
        *,
        sharding: NamedSharding | None = None,
        scale_format: ScaleFormat | None = None,
    ) -> QuantizedArray:
        """Loads the weights of experts, stacked [num_groups, n, k], as the grouped GEMMs take them.

        Args:
            name: the weight's name without ".weight" and with "{}" for the expert's number, such as
                "model.layers.3.mlp.experts.{}.down_proj"; or several, as for `load_quantized`.
            experts: their numbers, in the order of the groups.
            sharding: of the values, of 3 dimensions; see `load_quantized`.
            scale_format: see `load_quantized`.

        Returns:
            QuantizedArray(float8_e4m3fn[num_groups, n, k],
            float32[num_groups, ceil(n/128), ceil(k/128)]).

        Raises:
            KeyError, TypeError, ValueError: as for `load_quantized`.
        """
        templates = [name] if isinstance(name, str) else list(name)
        if not templates:
            raise ValueError("Checkpoint.load_experts: name must not be empty")
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(
                    f'Checkpoint.load_experts: name must have "{{}}" once, for the expert\'s '
                    f"number, got {template!r}"
                )
        groups = [
            [template.replace("{}", str(expert)) for template in templates] for expert in experts
        ]
        if not groups:
            raise ValueError("Checkpoint.load_experts: experts must not be empty")
        return self._load("Checkpoint.load_experts", groups, sharding, scale_format, True)

    def _load(
        self,
        function: str,
        groups: list[list[str]],
        sharding: NamedSharding | None,
        scale_format: ScaleFormat | None,
        stacked: bool,
    ) -> QuantizedArray:
        if scale_format not in (None, "float32", "ue8m0"):
            raise ValueError(
                f"{function}: scale_format must be None, 'float32' or 'ue8m0', got {scale_format!r}"
            )
        for names in groups:
            self._check_group(function, names, scale_format)
        values = _Stack([[self._find(function, n + WEIGHT).shape for n in g] for g in groups])
        scales = _Stack([[self._find(function, n + SCALE).shape for n in g] for g in groups])
        for stack in (values, scales):
            stack.check(function, groups)
        shardings: Any = (None, None)
        if sharding is not None:
            shape = values.shape if stacked else values.shape[1:]
            shardings = quantized_sharding(sharding, shape)

        def read_values(group: int, part: int, index: Any) -> Array:
            return self.read(groups[group][part] + WEIGHT, index)

        def read_scales(group: int, part: int, index: Any) -> Array:
            name = groups[group][part] + SCALE
            return to_float32_scales(function, name, self.read(name, index), scale_format)

        return QuantizedArray(
            values.make(stacked, shardings[0], np.dtype(ml_dtypes.float8_e4m3fn), read_values),
            scales.make(stacked, shardings[1], np.dtype(np.float32), read_scales),
        )

    def _check_group(
        self, function: str, names: list[str], scale_format: ScaleFormat | None
    ) -> None:
        """Raises unless a group's weights and scales are of the right types and shapes."""
        for i, name in enumerate(names):
            weight, scale = (self._find(function, name + suffix) for suffix in (WEIGHT, SCALE))
            if weight.dtype != ml_dtypes.float8_e4m3fn or len(weight.shape) != 2:
                raise TypeError(
                    f"{function}: {name}{WEIGHT} must be F8_E4M3 [n, k], "
                    f"got {_NAMES[weight.dtype]} {list(weight.shape)}"
                )
            _check_scale_type(function, name + SCALE, scale.dtype, scale_format)
            blocks = tuple(-(-size // BLOCK) for size in weight.shape)
            if scale.shape != blocks:
                raise ValueError(
                    f"{function}: {name}{SCALE} must be {list(blocks)} for a weight "
                    f"{list(weight.shape)}, got {list(scale.shape)}"
                )
            if i + 1 < len(names) and weight.shape[0] % BLOCK:
                raise ValueError(
                    f"{function}: {name}{WEIGHT} must have a multiple of {BLOCK} rows, because "
                    f"{names[i + 1]} follows it in the same array, got {weight.shape[0]}"
                )

    def _find(self, function: str, name: str) -> _Tensor:
        if name not in self._tensors:
            raise KeyError(f"{function}: there is no tensor {name}")
        return self._tensors[name]

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]


class _Stack:
    """A matrix for each group, made of parts one below the other."""

    def __init__(self, shapes: list[list[tuple[int, ...]]]) -> None:
        self.shapes = shapes
        self.rows = [0, *np.cumsum([shape[0] for shape in shapes[0]]).tolist()]
        self.shape = (len(shapes), self.rows[-1], shapes[0][0][1])

    def check(self, function: str, groups: list[list[str]]) -> None:
        """Raises unless all groups have the same shapes, and all parts the same columns."""
        for names, shapes in zip(groups, self.shapes, strict=True):
            for name, shape, first in zip(names, shapes, self.shapes[0], strict=True):
                wanted = (first[0], self.shape[2])
                if shape != wanted:
                    raise ValueError(
                        f"{function}: {name} must be {list(wanted)} like the others, "
                        f"got {list(shape)}"
                    )

    def make(
        self,
        stacked: bool,
        sharding: NamedSharding | None,
        dtype: np.dtype[Any],
        read: Callable[[int, int, Any], Array],
    ) -> jax.Array:
        """The array, each shard read by itself."""

        def callback(index: tuple[slice, ...]) -> Array:
            ranges = [
                range(*part.indices(size))
                for part, size in zip(
                    index if stacked else (slice(None), *index), self.shape, strict=True
                )
            ]
            groups, rows, columns = ranges
            shard = np.empty((len(groups), len(rows), len(columns)), dtype)
            for i, group in enumerate(groups):
                for part, (start, stop) in enumerate(
                    zip(self.rows[:-1], self.rows[1:], strict=True)
                ):
                    first, last = max(start, rows.start), min(stop, rows.stop)
                    if first < last:
                        where = (
                            slice(first - start, last - start),
                            slice(columns.start, columns.stop),
                        )
                        shard[i, first - rows.start : last - rows.start] = read(group, part, where)
            return shard if stacked else shard[0]

        return _make(self.shape if stacked else self.shape[1:], sharding, callback)


def to_float32_scales(
    function: str, name: str, scales: Array, scale_format: ScaleFormat | None
) -> Array:
    """Returns scales as float32; see `Checkpoint.load_quantized` for scale_format.

    Raises:
        TypeError: scales are of a type that scale_format does not allow.
        ValueError: a scale is not what scale_format says, or no normal number.
    """
    _check_scale_type(function, name, scales.dtype, scale_format)
    if scales.dtype == np.float32:
        if scale_format == "ue8m0" and not _are_powers_of_two(scales):
            raise ValueError(f"{function}: {name} must hold powers of two, as scale_format says")
        return scales
    exponents = scales.view(np.uint8)
    # 255 is NaN, and 0 is 2**-127, which is no normal float32: it would be zero on some devices.
    if ((exponents == 0) | (exponents == 255)).any():
        raise ValueError(f"{function}: {name} must hold exponents from 1 to 254")
    converted: Array = (exponents.astype(np.uint32) << 23).view(np.float32)
    return converted


def to_ue8m0_scales(scales: Any) -> Array:
    """Returns float32 scales that are powers of two as float8_e8m0fnu, exactly.

    Args:
        scales: float32, for example of `quantize_per_block(x, power_of_two=True)`.

    Raises:
        TypeError: scales are not float32.
        ValueError: a scale is no power of two.
    """
    array = np.asarray(scales)
    if array.dtype != np.float32:
        raise TypeError(f"to_ue8m0_scales: scales must be float32, got {array.dtype}")
    if not _are_powers_of_two(array):
        raise ValueError("to_ue8m0_scales: scales must be normal powers of two")
    return (array.view(np.uint32) >> 23).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)


def save_checkpoint(
    folder: str | Path,
    tensors: Mapping[str, Any],
    *,
    scale_format: ScaleFormat = "float32",
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Writes tensors as safetensors files with an index, in the naming of DeepSeek-V3.

    One file after the other: a tensor is fetched from its devices when its turn comes, an expert
    at a time, and nothing of it stays on the host. The files get their names when all are complete,
    the index last: what fails leaves the folder's old checkpoint as it was, and what succeeds
    leaves none of its files. A process that is killed just between the first renaming and the last
    leaves a folder that `Checkpoint` refuses.

    Args:
        folder: made if need be.
        tensors: by name: arrays, and QuantizedArrays [n, k] of 128 x 128 blocks, whose names come
            without ".weight". One with three dimensions is experts: its name has "{}" for their
            numbers, from 0.
        scale_format: "float32"; or "ue8m0": scales, which must be powers of two, become F8_E8M0.
        max_file_bytes: another file begins where one would hold more.

    Raises:
        TypeError: values are not float8_e4m3fn, or scales not float32; a name is no string, or a
            tensor no array of a type that the format has.
        ValueError: scales are not of 128 x 128 blocks, or are no powers of two and should be; an
            expert's name has no "{}", or another one has; two tensors would have the same name, or
            parts of one are in other processes.
    """
    function = "save_checkpoint"
    if scale_format not in ("float32", "ue8m0"):
        raise ValueError(
            f"{function}: scale_format must be 'float32' or 'ue8m0', got {scale_format!r}"
        )
    # Whatever is wrong with a tensor is found here, before anything is written.
    shards: list[dict[str, _Source]] = [{}]
    room = max_file_bytes
    taken: set[str] = set()
    for name, source in _flatten(function, tensors, scale_format):
        if name in taken:
            raise ValueError(f"{function}: two tensors would have the name {name}")
        taken.add(name)
        if source.nbytes > room and shards[-1]:
            shards.append({})
            room = max_file_bytes
        shards[-1][name] = source
        room -= source.nbytes
    files = {
        f"model-{i:05}-of-{len(shards):05}.safetensors": shard
        for i, shard in enumerate(shards, start=1)
    }
    total = sum(source.nbytes for shard in shards for source in shard.values())
    weight_map = {name: file for file, shard in files.items() for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for file, shard in files.items():
            _write_file(folder / (file + _INCOMPLETE), shard)
        with (folder / (INDEX + _INCOMPLETE)).open("w", encoding="utf-8") as opened:
            opened.write(json.dumps(index, indent=1) + "\n")
            _flush(opened)
    except BaseException:
        for file in (*files, INDEX):
            (folder / (file + _INCOMPLETE)).unlink(missing_ok=True)
        raise
    # While there is an incomplete index and no other, `Checkpoint` refuses the folder.
    (folder / INDEX).unlink(missing_ok=True)
    for file in (*files, INDEX):
        (folder / (file + _INCOMPLETE)).replace(folder / file)
    for old in list(folder.iterdir()):
        if _SHARD.fullmatch(old.name) and old.name not in files:
            old.unlink()


class _Source(NamedTuple):
    """A tensor to be written, not fetched yet."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fetch: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _flatten(
    function: str, tensors: Mapping[str, Any], scale_format: ScaleFormat
) -> Iterator[tuple[str, _Source]]:
    """What a checkpoint holds by whole names, checked."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == _METADATA:
            raise TypeError(
                f"{function}: names must be strings other than {_METADATA}, got {name!r}"
            )
        if not isinstance(tensor, QuantizedArray):
            if isinstance(tensor, tuple | Mapping):
                raise TypeError(
                    f"{function}: {name} must be an array or a QuantizedArray, "
                    f"got {type(tensor).__name__}"
                )
            array = _as_array(function, name, tensor)
            yield name, _Source(array.dtype, array.shape, partial(_fetch, array))
            continue
        values, scales = (_as_array(function, name, part) for part in tensor)
        if values.dtype != ml_dtypes.float8_e4m3fn or scales.dtype != np.float32:
            raise TypeError(
                f"{function}: {name} must be float8_e4m3fn with float32 scales, "
                f"got {values.dtype} with {scales.dtype}"
            )
        if (values.ndim, name.count("{}")) not in ((2, 0), (3, 1)):
            raise ValueError(
                f"{function}: {name} must have two dimensions, or three and {{}} once in its name, "
                f"got {list(values.shape)}"
            )
        rows = values.shape[-2]
        if block_shape(function, values, scales)[0] != BLOCK and rows != 1:
            raise ValueError(f"{function}: {name} must have 128 x 128 blocks, got 1 x 128")
        scale_type = np.dtype(np.float32)
        if scale_format == "ue8m0":
            scales = to_ue8m0_scales(_fetch(scales))
            scale_type = scales.dtype
        for expert in range(values.shape[0]) if values.ndim == 3 else [None]:
            whole = name if expert is None else name.replace("{}", str(expert))
            for suffix, part, dtype in (
                (WEIGHT, values, values.dtype),
                (SCALE, scales, scale_type),
            ):
                yield (
                    whole + suffix,
                    _Source(np.dtype(dtype), part.shape[-2:], partial(_fetch, part, expert)),
                )


def _as_array(function: str, name: str, tensor: Any) -> Any:
    """The tensor as an array where it is, of a type that files have, all of it in this process."""
    array = tensor if isinstance(tensor, jax.Array) else np.asarray(tensor)
    if array.dtype not in _NAMES:
        raise TypeError(
            f"{function}: {name} must be of a type that safetensors files have, got {array.dtype}"
        )
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise ValueError(f"{function}: {name} must not have parts in other processes")
    return array


def _fetch(array: Any, expert: int | None = None) -> Array:
    """An array on the host, or one expert's part of it.

    JAX keeps the host copy of an array that was converted as long as the array lives. So that of
    no array that lives on is converted: of a part of it, or of another array of the same buffers.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array if expert is None else array[expert])
    result = np.empty(array.shape if expert is None else array.shape[1:], array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id != 0:
            continue
        data = shard.data
        if expert is None:
            alias = jax.make_array_from_single_device_arrays(data.shape, data.sharding, [data])
            result[shard.index] = np.asarray(alias)
            continue
        groups, *where = shard.index
        local = expert - (groups.start or 0)
        if 0 <= local < data.shape[0]:
            result[tuple(where)] = np.asarray(data[local])
    return result


def _are_powers_of_two(scales: Array) -> bool:
    bits = scales.view(np.uint32)
    exponents = bits >> 23
    return bool(((bits << 9 == 0) & (exponents > 0) & (exponents < 255)).all())


def _check_scale_type(
    function: str, name: str, dtype: np.dtype[Any], scale_format: ScaleFormat | None
) -> None:
    allowed = {
        None: ("F32", "F8_E8M0"),
        "float32": ("F32",),
        "ue8m0": ("F32", "F8_E8M0", "U8"),
    }[scale_format]
    if _NAMES.get(dtype) not in allowed:
        hint = ""
        if dtype == np.uint8 and scale_format is None:
            hint = '; scale_format="ue8m0" reads it as exponents of powers of two'
        raise TypeError(
            f"{function}: {name} must be {' or '.join(allowed)}, "
            f"got {_NAMES.get(dtype, dtype)}{hint}"
        )


def _make(
    shape: tuple[int, ...], sharding: NamedSharding | None, read: Callable[[Any], Array]
) -> jax.Array:
    if sharding is None:
        whole: jax.Array = jax.device_put(read((slice(None),) * len(shape)))
        return whole
    return jax.make_array_from_callback(shape, sharding, read)


# --- The format ----------------------------------------------------------------------------------


def _files(path: Path) -> dict[Path, list[str]]:
    """The safetensors files that a path stands for, each with what an index says it holds."""
    if path.is_file():
        return {path: []}
    index = path / INDEX
    if index.is_file():
        return _read_index(index)
    if index.with_name(INDEX + _INCOMPLETE).exists():
        raise ValueError(f"Checkpoint: {path} was being saved and is not complete")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"Checkpoint: there is no safetensors file in {path}")
    return {file: [] for file in files}


def _read_index(index: Path) -> dict[Path, list[str]]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Checkpoint: {index} is no index: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"Checkpoint: {index} has no weight_map")
    files: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or Path(file).name != file:
            raise ValueError(
                f"Checkpoint: {index} must name a file beside it for {name}, got {file!r}"
            )
        files.setdefault(index.with_name(file), []).append(name)
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"Checkpoint: {index} names {path.name}, which is not there")
    return files


def _read_header(file: Path) -> Iterator[tuple[str, _Tensor]]:
    """The tensors of a file: 8 bytes with the size of a JSON header, the header, the data."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        prefix = opened.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"Checkpoint: {file} is no safetensors file: its header does not fit")
        try:
            header = json.loads(opened.read(header_bytes), object_pairs_hook=_without_duplicates)
        except ValueError as error:
            raise ValueError(f"Checkpoint: {file} is no safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"Checkpoint: {file} is no safetensors file: its header is no object")
    for name, entry in header.items():
        if name == _METADATA:
            continue
        type_name, shape, begin, end = _read_entry(file, name, entry)
        if begin > end or 8 + header_bytes + end > size:
            raise ValueError(f"Checkpoint: the bytes of {name} do not fit into {file}")
        dtype = None
        if type_name in _TYPES:
            dtype = np.dtype(_TYPES[type_name])
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"Checkpoint: the bytes of {name} do not fit into {file}")
        yield name, _Tensor(dtype, type_name, shape, file, 8 + header_bytes + begin)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands in its header twice")
    return dict(pairs)


def _read_entry(file: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """A tensor's type, shape and first and last byte, of a header that may hold anything."""
    fields = entry if isinstance(entry, dict) else {}
    type_name, shape = fields.get("dtype"), fields.get("shape")
    offsets = fields.get("data_offsets")
    if (
        isinstance(type_name, str)
        and isinstance(shape, list)
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(type(number) is int and number >= 0 for number in (*shape, *offsets))
    ):
        return type_name, tuple(shape), offsets[0], offsets[1]
    raise ValueError(
        f"Checkpoint: {file} is no safetensors file: {name} must have dtype, shape and data_offsets"
    )


def _write_file(file: Path, tensors: Mapping[str, _Source]) -> None:
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    offset = 0
    # Wider types first, so that each tensor is aligned to its elements.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    for name, source in ordered:
        header[name] = {
            "dtype": _NAMES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [offset, offset + source.nbytes],
        }
        offset += source.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for _, source in ordered:
            opened.write(np.ascontiguousarray(source.fetch()).reshape(-1).view(np.uint8).data)
        _flush(opened)


def _flush(opened: IO[Any]) -> None:
    """Makes sure that what was written is on the disk before another name points to it."""
    opened.flush()
    os.fsync(opened.fileno())

"""Deterministic tensors for parity checks.

Everything here depends only on a name and a shape, needs nothing but numpy and
the standard library, and is bit-exact on every platform (64-bit integer
arithmetic modulo 2**64 and one exact scaling; only `orthonormal` goes through
LAPACK and is exact to about 1e-14).

Generator
---------
u(name, n)[i] = 2 * (mix(seed(name) + (i + 1) * STEP) >> 11) * 2**-53 - 1
seed(name)    = crc32(utf8(name)) * 0x100000001 + len(utf8(name))
mix           = the finaliser of the public-domain SplitMix64 generator (uint64).
The values look uniform in [-1, 1); index i runs in C (row-major) order.

Fill rule for a state_dict entry (u as above, seeded by the key)
---------------------------------------------------------------
 1. integer / bool tensors                 -> None  (leave what the model has)
 2. "...parametrizations.weight.original"  -> zeros if square, else minus the
                                              (rectangular) identity
 3. "...parametrizations.weight.0.base"    -> orthonormal(key, n, n)
    (2 and 3 together make the effective torch orthogonal weight equal to the
     first k columns of orthonormal(key of base, n, n))
 4. "...running_var"                       -> 1 + 0.25 u
 5. "...running_mean"                      -> 0.1 u
 6. 1-d, key ends with "sampling_offsets.bias" -> 2 u
 7. 1-d, key ends with "bias"              -> 0.1 u
 8. other 1-d (norm scales and the like)   -> 1 + 0.1 u
 9. >= 2-d with leading dimension 1 (tokens, position tables) -> 0.5 u
10. other >= 2-d                           -> sqrt(3 / fan_in) u,
                                              fan_in = product of shape[1:]
    (unit gain: standard deviation 1 / sqrt(fan_in))

Keys may be aliased before use (`alias`: list of (prefix, replacement)), so that
one tensor registered under two names gets one value; `salt` is prepended to the
key to get a second, different model.
"""

import zlib

import numpy as np

_STEP = 0x9E3779B97F4A7C15
_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def uniform(name, shape):
    """float64 array in [-1, 1), a function of (name, number of elements) only."""
    raw = name.encode("utf-8")
    count = 1
    for d in shape:
        count *= int(d)
    seed = (zlib.crc32(raw) * 0x100000001 + len(raw)) & _MASK
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_STEP) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_M1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_M2)
        z = z ^ (z >> np.uint64(31))
    u = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (2.0 * u - 1.0).reshape(tuple(int(d) for d in shape))


def orthonormal(name, n, k):
    """n x k matrix (n >= k) with orthonormal columns.

    Reduced QR of uniform(name, (n, k)), column signs fixed so that diag(R) > 0.
    This makes it unique, whatever QR routine is used.
    """
    q, r = np.linalg.qr(uniform(name, (n, k)))
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def apply_alias(key, alias=()):
    for prefix, replacement in alias:
        if key.startswith(prefix):
            return replacement + key[len(prefix) :]
    return key


def fill_value(key, shape, is_float=True, alias=(), salt=""):
    """float64 array for one state_dict entry, or None to leave it alone."""
    if not is_float:
        return None
    shape = tuple(int(d) for d in shape)
    name = salt + apply_alias(key, alias)
    if key.endswith("parametrizations.weight.original"):
        if shape[-2] == shape[-1]:
            return np.zeros(shape)
        return -np.eye(shape[-2], shape[-1])
    if key.endswith("parametrizations.weight.0.base"):
        return orthonormal(name, shape[0], shape[1])
    u = uniform(name, shape)
    if key.endswith("running_var"):
        return 1.0 + 0.25 * u
    if key.endswith("running_mean"):
        return 0.1 * u
    if len(shape) <= 1:
        if key.endswith("sampling_offsets.bias"):
            return 2.0 * u
        if key.endswith("bias"):
            return 0.1 * u
        return 1.0 + 0.1 * u
    if shape[0] == 1:
        return 0.5 * u
    fan_in = 1
    for d in shape[1:]:
        fan_in *= d
    return np.sqrt(3.0 / fan_in) * u


def inputs(name, shape, scale=1.0, offset=0.0):
    """offset + scale * uniform("input:" + name, shape)."""
    return offset + scale * uniform("input:" + name, shape)


def soft_targets(labels, num_classes, lam, smoothing):
    """Mixed and smoothed one-hot targets, mixing row i with row B-1-i."""
    off = smoothing / num_classes
    on = 1.0 - smoothing + off
    hard = np.full((len(labels), num_classes), off)
    hard[np.arange(len(labels)), np.asarray(labels)] = on
    return lam * hard + (1.0 - lam) * hard[::-1]


def summary(name, array, rows=False):
    """What the JSON files keep of a tensor.

    probe = <array, uniform("probe:" + name, array.shape)> notices permutations,
    which sum and norm do not.
    """
    a = np.asarray(array, dtype=np.float64)
    out = {
        "shape": list(a.shape),
        "sum": float(a.sum()),
        "norm": float(np.sqrt((a * a).sum())),
        "probe": float((a * uniform("probe:" + name, a.shape)).sum()),
        "absmax": float(np.abs(a).max()) if a.size else 0.0,
    }
    if rows:
        out["first8"] = [[float(v) for v in row.reshape(-1)[:8]] for row in a]
    else:
        out["first8"] = [float(v) for v in a.reshape(-1)[:8]]
    return out


def fill_torch(module, alias=(), salt=""):
    """Fill a torch module in place, in its own dtype; returns the module.

    The values are computed in float64 and rounded to the dtype of each entry.
    """
    import torch

    state = module.state_dict()
    with torch.no_grad():
        for key, tensor in state.items():
            value = fill_value(key, tuple(tensor.shape), tensor.is_floating_point(), alias=alias, salt=salt)
            if value is not None:
                state[key] = torch.from_numpy(np.ascontiguousarray(value)).to(tensor.dtype)
    module.load_state_dict(state)
    return module

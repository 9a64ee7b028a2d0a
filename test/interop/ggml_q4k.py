"""Q4_K by the search of ggml's quantizer (ggml-quants.c: make_qkx3_quants, make_qp_quants, quantize_row_q4_K_impl with
an importance matrix), in numpy. Usage: ggml_q4k.py WEIGHTS.f32 IMPORTANCE.f32 (n x 256, 256); prints the sum over all
weights of importance x squared error."""
import json
import sys

import numpy as np

weights = np.fromfile(sys.argv[1], "<f4").reshape(-1, 256)
importance = np.fromfile(sys.argv[2], "<f4")


def make_qkx3(x, w, nmax=15, rmin=-0.9, rdelta=0.05, nstep=36):
    low, high = min(x.min(), 0.0), x.max()
    if high <= low:
        return 0.0, -low
    sum_w, sum_x = w.sum(), (w * x).sum()
    scale = (high - low) / nmax
    codes = np.clip(np.rint((x - low) / scale), 0, nmax)
    best = (w * (scale * codes + low - x) ** 2).sum()
    minimum = low
    for step in range(nstep + 1):
        codes = np.clip(np.rint((rmin + rdelta * step + nmax) / (high - low) * (x - low)), 0, nmax)
        sum_l, sum_l2, sum_xl = (w * codes).sum(), (w * codes**2).sum(), (w * codes * x).sum()
        determinant = sum_w * sum_l2 - sum_l**2
        if determinant <= 0:
            continue
        own, offset = (sum_w * sum_xl - sum_x * sum_l) / determinant, (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        if offset > 0:
            offset, own = 0.0, sum_xl / sum_l2
        error = (w * (own * codes + offset - x) ** 2).sum()
        if error < best:
            best, scale, minimum = error, own, offset
    return scale, -minimum


def make_qp(x, w, nmax=63):
    top = x.max()
    if top < 1e-15:
        return 0.0, np.zeros_like(x)
    inverse = nmax / top
    best = (w * (x - np.rint(inverse * x) / inverse) ** 2).sum()
    for step in range(-4, 5):
        other = (0.1 * step + nmax) / top
        error = (w * (x - np.minimum(np.rint(other * x), nmax) / other) ** 2).sum()
        if step != 0 and error < best:
            best, inverse = error, other
    codes = np.minimum(np.rint(inverse * x), nmax)
    sum_lx, sum_l2 = (w * x * codes).sum(), (w * codes**2).sum()
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            lx, l2 = sum_lx - w[i] * x[i] * codes[i], sum_l2 - w[i] * codes[i] ** 2
            if lx <= 0 or l2 <= 0:
                continue
            code = min(nmax, np.rint(x[i] * l2 / lx))
            if code == codes[i]:
                continue
            lx, l2 = lx + w[i] * x[i] * code, l2 + w[i] * code**2
            if lx * lx * sum_l2 > sum_lx * sum_lx * l2:
                sum_lx, sum_l2, codes[i], changed = lx, l2, code, True
        if not changed:
            break
    return sum_lx / sum_l2, codes


total = 0.0
for row in weights.astype(np.float64):
    w = importance * np.sqrt(2 * (row**2).mean() + row**2)
    groups = [slice(32 * j, 32 * j + 32) for j in range(8)]
    scales, minima = map(np.array, zip(*(make_qkx3(row[g], w[g]) for g in groups)))
    sums = np.array([w[g].sum() for g in groups])
    d, own_scales = make_qp(scales, sums)
    dmin, own_minima = make_qp(minima, sums)
    d, dmin = float(np.float16(d)), float(np.float16(dmin))
    for j, g in enumerate(groups):
        step, offset = d * own_scales[j], dmin * own_minima[j]
        codes = np.clip(np.rint((row[g] + offset) / step), 0, 15) if step else np.zeros(32)
        total += (importance[g] * (step * codes - offset - row[g]) ** 2).sum()
print(json.dumps({"error": total}))

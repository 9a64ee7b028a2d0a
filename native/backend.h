// The native contract of deepseek-convert: one table of functions that every backend (CPU, CUDA) fills.
// The TypeScript half is src/backend/ops.ts, which checks shapes and dtypes before anything gets here.
//
// Queues. addon.cc owns one in-order queue thread per device and calls `op`, `upload`, `download` and `sync` from
// it alone; `read_file`, `write_file` and `fence` are called from its I/O threads. A CPU op runs where it is called;
// a CUDA op launches on the compute stream and returns.
//
// Tensors are views: `data` points at the first element, strides count elements (0 broadcasts), rank <= 4; the
// lengths beyond `rank` are 1. Ops write outputs completely: they never rely on what the memory held before, except
// where a line says "+=" or "in place". T = tokens, K = in features, N = out features, E = experts, G = groups.
#pragma once
#include <stddef.h>
#include <stdint.h>

// Version of the structures, then how many ops there are: an op more or less moves those behind it.
#define DC_ABI (2100 + DC_OP_COUNT)

enum dc_dtype {  // numbers are fixed: src/base/dtype.ts has the same
  DC_F32, DC_BF16, DC_F16, DC_F64, DC_I8, DC_U8, DC_I16, DC_U16, DC_I32, DC_U32, DC_I64, DC_U64, DC_BOOL,
  DC_F8_E4M3, DC_F8_E5M2,
};

typedef struct {
  void* data;  // NULL: this optional tensor is absent
  int32_t dtype;
  int32_t rank;
  int64_t dim[4];
  int64_t stride[4];
} dc_tensor;

// One call: tensors (outputs first), integers and numbers in the order that DC_OPS gives.
typedef struct {
  const dc_tensor* t;
  const int64_t* i;
  const double* f;
  int32_t nt, ni, nf;
} dc_call;

typedef struct dc_context dc_context;
typedef int (*dc_op)(dc_context*, const dc_call*);  // 0, or non-zero with last_error set

// X(name, tensors, integers, numbers). [x] may be absent. float = f32, bf16 or f16 in any mix; sums are kept in fp32.
#define DC_OPS(X)                                                                                                      \
  /* -- movement ---------------------------------------------------------------------------------------------- */     \
  /* Element-wise copy between any strides and any dtypes, one rounding to nearest even; integers saturate, NaN becomes
     0 there; E4M3, which has no infinity, saturates finite values and makes NaN of infinities. With `counts` i64[2] +=
     {finite values that became infinite or saturated, non-finite values met}. */                                      \
  X(copy, "dst src [counts]", "", "")                                                                                  \
  /* Stored blocks -> values. src u8 [bytes], rows without gaps; encoding: dc_encoding; FP4 holds the even column in the
     low half. scale: the block scales of FP8/FP4 [ceil(N/rows), ceil(K/columns)] as f32, bf16 or u8 (E8M0). dst float
     [N, K], product in fp32, rounded once. */                                                                         \
  X(decode, "dst src [scale]", "encoding rows columns", "")                                                            \
  X(fill, "dst", "", "value")                                                                                          \
  /* Philox4x32-10 with key (seed_low, seed_high): row-major elements 4i..4i+3 take the four words r of counter i, u =
     (r >> 8) 2^-24. kind 0: a + (b - a) u, the same bits on every backend; 1: normal(mean a, deviation b) by
     Box-Muller on (u + 2^-24, next u), cosine then sine (equal up to rounding). */                                    \
  X(random, "dst", "kind seed_low seed_high", "a b")                                                                   \
  /* dst[j] = src[idx[j]] along `axis` of a matrix; idx i32, -1 gives zeros. The CPU refuses indices out of range, here
     and below; CUDA does not look. */                                                                                 \
  X(gather, "dst src idx", "axis", "")                                                                                 \
  /* dst[idx[j]] += w[j] src[j], rows, in order of j, each row summed in fp32 and rounded once. idx -1 is skipped. */  \
  X(scatter_add, "dst src idx [w]", "", "")                                                                            \
  /* -- mathematics ------------------------------------------------------------------------------------------- */     \
  /* C = alpha A B + beta C + bias. A [M,K], B [K,N], C [M,N] float of any strides with one of the two equal 1
     (transposes are views); rank 3 = batch (stride 0 shares); bias [N]. precision 0: fp32 products for fp32 inputs,
     bf16 tensor cores for bf16 inputs; 1: TF32/bf16x1 allowed on fp32 inputs; 2: three bf16 products (2^-16). */                                      \
  X(gemm, "C A B [bias]", "precision", "alpha beta")                                                                   \
  /* Rows of A [T,K] lie sorted by expert, expert e owns rows offsets[e]..offsets[e+1]: C[r] = A[r] B[e]^T.
     B [E,N,K], offsets i32 [E+1]. */                                                                                  \
  X(grouped_gemm, "C A B offsets", "", "")                                                                             \
  X(unary, "dst src", "kind", "a b")                    /* dc_unary; any strides */                                    \
  /* dst = a (kind) alpha b; strides 0 broadcast; in place is fine. MAX and MIN: a NaN on either side wins. */         \
  X(binary, "dst a b", "kind", "alpha")                                                                                \
  /* Along the middle of src [outer, n, inner] -> dst [outer, inner]; dc_reduce; arg kinds give i32, others fp32. Of
     equal extremes the first counts, a NaN wins over all. */                                                          \
  X(reduce, "dst src", "kind", "")                                                                                     \
  /* -- layers ------------------------------------------------------------------------------------------------ */     \
  /* y = x rsqrt(mean(x^2) + eps) (w + offset), rows of [T,C]; rstd f32 [T]. */                                        \
  X(rmsnorm, "y x [w] [rstd]", "", "eps offset")                                                                       \
  X(rmsnorm_backward, "dx [dw+=] dy x [w] rstd", "", "offset")                                                         \
  X(layernorm, "y x [w] [b]", "", "eps")                                                                               \
  /* y = act(gate) up; dc_unary. limit > 0 clamps gate to at most limit and up to [-limit, limit] first; backward
     nothing flows through a clamped value. */                                                                         \
  X(swiglu, "y gate up", "activation", "limit")                                                                        \
  X(swiglu_backward, "dgate dup dy gate up", "activation", "limit")                                                    \
  X(softmax, "y x", "", "scale")                        /* rows of [T,C]: softmax(scale x) */                          \
  X(softmax_backward, "dx dy y", "", "scale")                                                                          \
  /* x [B,S,H,D]; cos, sin f32 [P, R/2], R <= D rotates the first R (from_end 1: the last R); positions i32 [B,S].
     interleaved 0: halves (i, i + R/2), 1: pairs (2i, 2i+1); inverse 1 rotates back (= its backward). */              \
  X(rope, "y x cos sin positions", "interleaved from_end inverse", "")                                                 \
  /* Per row of logits [T,V]: lse f32 [T], loss[t] = lse - logits[target] (target -1: 0), top i32 [T] argmax, the first
     of equals. Backward: scale (softmax - onehot), zeros for target -1. */                                            \
  X(cross_entropy, "loss logits targets [lse] [top]", "", "")                                                          \
  X(cross_entropy_backward, "dlogits logits targets lse", "", "scale")                                                 \
  /* kl[t] = KL(softmax(p[t]) || softmax(q[t])) in nats, same[t] = 1.0 where both have the same argmax. Backward: scale
     (softmax(q) - softmax(p)). */                                                                                     \
  X(kl, "kl p q [same]", "", "")                                                                                       \
  X(kl_backward, "dq p q", "", "scale")                                                                                \
  /* One token of each row of logits float [T,V], with e = exp((x - max) / temperature), below min_p 0: of the top_k largest
     (0: all) the fewest whose e reach top_p of theirs, at least one, ties to the lower id; of these, in order of id, the
     first at which the running sum of e exceeds u (f64 [T], in [0, 1)) of the whole. temperature 0: the first of the
     largest. logprob f32 [T]: log softmax(x) of the token. A row that is not all finite or -infinity, or all -infinity:
     -1, NaN. */                                                                                                       \
  X(sample, "tokens logits u [logprob]", "top_k", "temperature top_p min_p")                                           \
  /* -- attention --------------------------------------------------------------------------------------------- */     \
  /* o [B,S,Hq,Dv], q [B,S,Hq,D], k [B,T,Hkv,D], v [B,T,Hkv,Dv]; query s stands at key position s + offset; keys
     >= lengths[b] (i32 [B]) are masked; causal 1; window > 0: only the last `window` keys; cap > 0: cap tanh(x / cap)
     soft cap on scores; sinks f32 [Hq]: an extra score in the softmax's denominator, also in lse f32 [B,Hq,S]. Without
     causal the window bounds keys from below alone. A query that sees no key: o = 0, lse = -infinity (or its sink). */\
  X(attention, "o q k v [lengths] [sinks] [lse]", "causal window offset", "scale cap")                                 \
  X(attention_backward, "dq dk dv do o q k v lse [lengths]", "causal window offset", "scale")                          \
  /* Two attentions on the same positions (Hkv and D may differ), maps never stored. out f32 [B,Hq,S,3]: Jensen-Shannon
     divergence (nats), cosine, overlap of the top-8 keys (of min(8, keys); ties to the lower position), all of the rows
     without key position 0 and renormalised (which takes sinks out as well); cap > 0: soft cap on that side's scores, as
     for attention; NaN where a query has no other key. */                                                             \
  X(attention_compare, "out qa ka qb kb [lengths]", "causal window offset", "scale_a scale_b cap_a cap_b")             \
  /* -- experts ----------------------------------------------------------------------------------------------- */     \
  /* Router: logits [T,E] -> idx i32 [T,k], w f32 [T,k]. scoring: 0 softmax, 1 sigmoid, 2 sqrt(softplus). Selection by
     score + bias[E]; weights from score alone. groups > 1: the best `top_groups` groups by (group_score 0: max,
     1: sum of the two best). normalize: w /= sum(w) + 1e-20. w *= scale. Best first, ties to the lower index, NaN last:
     an index is always valid. */                                                                                      \
  X(route, "w idx logits [bias]", "scoring groups top_groups group_score normalize", "scale")                          \
  /* idx i32 [T,k] -> slots i32 [T k] (t k + j, sorted by expert, stable), tokens i32 [T k] (slot / k), offsets i32
     [E+1], place i32 [T,k] (where slot t k + j went). */                                                              \
  X(expert_sort, "slots tokens offsets place idx", "", "")                                                             \
  /* out[t] = sum_j w[t,j] y[place[t,j]] (+ base[t]). */                                                               \
  X(expert_combine, "out y place w [base]", "", "")                                                                    \
  /* Backward of the three above that have gradients: dB f32 [E,N,K]: dB[e] += dC_e' A_e over the rows of expert e;
     dy [T k,C] and dw f32 [T,k] from dout; dlogits from dw f32, through the chosen experts' scores. */                \
  X(grouped_outer, "dB+= dC A offsets", "", "")                                                                        \
  X(expert_combine_backward, "dy dw dout y place w", "", "")                                                           \
  X(route_backward, "dlogits dw logits idx", "scoring normalize", "scale")                                             \
  /* Gradient of scale sum_te p_te c_te for scores s, where p = sigmoid((s - tau_t) / temperature) with tau_t such that
     sum_e p_te = active, 0 < active < E: ds f32 [T,E] = scale q (c - sum(q c) / sum(q)) / temperature, q = p (1 - p).
     s, c float [T,E]. */                                                                                              \
  X(choice_gradient, "ds s c", "active", "temperature scale")                                                          \
  /* -- linear algebra and quantization ------------------------------------------------------------------------ */    \
  /* H f32 [K,K] += alpha sum_t row_weight_t X_t'X_t, lower triangle only (the upper is undefined); X float [T,K]. With
     offsets i32 [E+1] and H [E,K,K], rows are sorted by expert. row_weight f32 [T] (absent: 1). */                    \
  X(hessian_add, "H+= X [offsets] [row_weight]", "", "alpha")                                                          \
  X(symmetrize, "H", "", "")                            /* in place: upper := lower; rank 3 = batch */                 \
  /* A = H + damp mean(diag H) I, of which only the lower triangle is read. kind 0: A = F F', F lower. kind 1:
     A = F F', F upper (the reversed factor of LDLQ). The other triangle of F is zeroed. info i32 [batch]: 0, or 1 +
     the index of a row whose pivot is not positive and finite (F is then undefined). rank 3 = batch. */               \
  X(cholesky, "F info H", "kind", "damp")                                                                              \
  /* A X = B, F from cholesky of the same kind; B, X f32 [K,M]; rank 3 = batch. */                                     \
  X(cholesky_solve, "X F B", "kind", "")                                                                               \
  /* LDLQ sweep (Chee et al. 2023, eq. 2), equal to GPTQ's codes: for column j: v = W_j + sum_{i<j} (W_i - Q_i) R_ij /
     R_jj; codes_j = clamp(round(v / s + z), low, high), rounding to nearest even, NaN to low; Q_j = (codes_j - z) s.
     W, Q f32 [N,K], R f32 [K,K] upper, scale, zero f32 [N,G] (zero absent: 0; need not be integers), column j has
     group column_group[j] (i32 [K], for rank 3 also [E,K]) or j / group. Rank 3 = E.
     error f32 [N] = sum_j ((v_j - Q_j) R_jj)^2, the output error under H; not finite where W or R is not. */          \
  X(ldlq, "codes Q W R scale [zero] [column_group] [error]", "low high group", "")                                     \
  /* Grid per row and group of W float [N,K] minimising sum_j weight_j (w_j - deq(w_j))^2 over `points` evenly spaced
     multiples from..to of a base scale (1 point: `from`). zero absent: base = max|w| / ((high - low) / 2); free_sign 1
     tries -scale too (codes [-8,7]: the longer side serves the heavier tail). zero present: base = (max - min) /
     (high - low) with 0 within min..max, zero = round(low - min / base) and its two neighbours, an integer in
     low..high. First best wins, + before -. weight f32 [K] ([E,K] for rank 3; absent, or all 0 in a group: 1); values
     that are not finite do not count; groups of zeros get scale 1. */                                                 \
  X(scale_search, "scale [zero] W [weight]", "low high group points free_sign", "from to")                             \
  /* As in ldlq, without feedback. W float; rank 3 = E. */                                                             \
  X(quantize, "codes W scale [zero] [column_group]", "low high group", "")                                             \
  X(dequantize, "W codes scale [zero] [column_group]", "group", "")                                                    \
  /* Least-squares refit of each row's scales (in place) under the full H with the codes fixed: scale += d, (D'HD +
     damp mean(diag D'HD) I) d = D'H (w - D scale), D [K,G] = codes - zero by group. H f32 [K,K] symmetric; a row whose
     system is singular, and a scale that would become 0 or not finite, stay. gradient f32 [N,K]: (W - Q) H, where it is
     known already. rank 3 = E. */                                                                                     \
  X(scale_refit, "scale codes W H [zero] [column_group] [gradient]", "group", "damp")                                  \
  /* Coordinate descent over the codes of each row under H f32 [K,K] symmetric, in place: `passes` times (fewer when
     nothing changes) j = 0..K-1: code_j = clamp(round(code_j + g_j / (s H_jj)), low, high), g = (W - Q) H; columns with
     H_jj = 0 stay. changed i32 [N]: codes that differ from before. gradient f32 [N,K]: g at the start, where it is known
     already; undefined afterwards. gain f32 [N]: by how much (W - Q) H (W - Q)' of each row has fallen. rank 3 = E. */ \
  X(code_descent, "codes W H scale [zero] [column_group] [changed] [gradient] [gain]", "low high group passes", "")    \
  /* `bits`-wide fields, (code + bias), little end first into i32 words along the last (axis 1) or first (axis 0)
     dimension of codes i8 [R,C], floor(32 / bits) a word; order 1: AWQ's interleave 0 2 4 6 1 3 5 7; order 2: one
     stream of bits, fields cross words (GPTQ's 3 bits). The last word is padded with zeros. */                        \
  X(pack, "words codes", "bits bias axis order", "")                                                                   \
  X(unpack, "codes words", "bits bias axis order", "")                                                                 \
  /* y [M,N] = x [M,K] W' + bias, w = (u - zero) scale, u: compressed-tensors packed words i32 [N, ceil(K/8)], scale
     float [N,G], zero i32 packed along N [ceil(N/8), G] (absent: 8), as stored. */                                    \
  X(int4_matmul, "y x words scale [zero] [bias]", "group", "")                                                         \
  /* Values float [N,K] -> GGML blocks (dc_encoding) u8 [N, bytes of a row]. Scales (and minima) are searched for the
     least squared error weighted with weight f32 [K] (importance; absent, or all 0 in a block: 1). */                  \
  X(encode, "dst src [weight]", "encoding", "")                                                                        \
  /* The integer grid of encoded blocks: w = (code - zero) scale, scale and zero f32 [N, groups]; zero is there for
     encodings with minima only. So that error feedback can choose codes on it, to be put back by block_codes. */      \
  X(block_grid, "scale [zero] src", "encoding", "")                                                                    \
  /* Replaces the codes i8 [N,K] (as on block_grid's grid) of encoded blocks, in place; scales stay. */                \
  X(block_codes, "dst codes", "encoding", "")                                                                          \
  /* -- training ---------------------------------------------------------------------------------------------- */     \
  /* y = s (clamp(round(w / s + z), low, high) - z), w [N,K], scale, zero f32 [N,G]. Backward: straight through where
     the rounded code lies in low..high, else dw = 0; LSQ gradients (Esser et al. 2020) of scale, without the factor
     that the paper puts on them, and of zero. */                                                                      \
  X(fake_quant, "y w scale [zero]", "low high group", "")                                                              \
  X(fake_quant_backward, "dw dscale [dzero] dy w scale [zero]", "low high group", "")                                  \
  /* AdamW (Loshchilov & Hutter 2019), p, m, v f32 in place; g float; bias-corrected for `step` (from 1);
     clip f32 [1] multiplies g (absent: 1). */                                                                         \
  X(adamw, "p m v g [clip]", "step", "lr beta1 beta2 eps decay")                                                       \
  /* out f32 [2] += {sum of squares of the finite values, count of non-finite values}. */                              \
  X(norm_add, "out+= x", "", "")

enum dc_op_index {
#define X(name, t, i, f) DC_OP_##name,
  DC_OPS(X)
#undef X
  DC_OP_COUNT
};

enum dc_encoding {
  DC_ENC_Q4_0, DC_ENC_Q4_1, DC_ENC_Q5_0, DC_ENC_Q5_1, DC_ENC_Q8_0, DC_ENC_Q2_K, DC_ENC_Q3_K, DC_ENC_Q4_K, DC_ENC_Q5_K,
  DC_ENC_Q6_K, DC_ENC_IQ4_NL, DC_ENC_MXFP4, DC_ENC_F8_E4M3, DC_ENC_F4_E2M1,
};
enum dc_unary {  // a, b: parameters where noted
  DC_NEG, DC_ABS, DC_SQUARE, DC_SQRT, DC_RSQRT, DC_EXP, DC_LOG, DC_SIGMOID, DC_SILU, DC_GELU, DC_GELU_TANH, DC_RELU,
  DC_TANH, DC_SOFTPLUS, DC_SOFTCAP /* a tanh(x / a) */, DC_AFFINE /* a x + b */, DC_RECIPROCAL, DC_RELU2,
  DC_CLAMP /* to [a, b] */, DC_IS_NONFINITE /* 1 or 0 */,
};
enum dc_binary { DC_ADD, DC_SUB, DC_MUL, DC_DIV, DC_MAX, DC_MIN, DC_EQUAL };
enum dc_reduce { DC_SUM, DC_MEAN, DC_RMAX, DC_RMIN, DC_ABSMAX, DC_SUMSQ, DC_ARGMAX, DC_ARGMIN };

// What several devices of one backend do together, in place, on dense f32 or bf16 tensors of which each rank has one of
// the same size. Of n ranks, rank r's part of a tensor is the elements r c .. (r + 1) c, c = ceil(elements / n); the last
// parts may be shorter or empty. Sums are kept in fp32, and every run gives the same bytes.
enum dc_collective {
  DC_ALL_REDUCE,      // every rank has the sum
  DC_REDUCE_SCATTER,  // every rank has its own part of the sum; the rest of its tensor is undefined
  DC_ALL_GATHER,      // every rank's own part goes to all
  DC_COLLECTIVE_COUNT
};
typedef struct dc_group dc_group;

typedef struct {
  uint32_t abi;      // DC_ABI
  const char* name;  // "cpu", "cuda"
  // options: JSON {"threads": n}. NULL: failed, reason in `error`.
  dc_context* (*open)(int device, const char* options, char* error, size_t error_bytes);
  void (*close)(dc_context*);
  // JSON about the device: name, memory {total, free}, features, libraries and where each was looked for.
  int (*info)(dc_context*, char* json, size_t bytes);
  const char* (*last_error)(dc_context*);
  void* (*alloc)(dc_context*, size_t bytes);  // 64-byte aligned; NULL: out of memory
  void (*free)(dc_context*, void*);
  int (*upload)(dc_context*, void* dst, const void* src, size_t bytes);    // src may be reused on return
  int (*download)(dc_context*, void* dst, const void* src, size_t bytes);  // done on return
  int (*sync)(dc_context*);                                                // everything enqueued is done
  int (*fence)(dc_context*);  // like sync, but callable from any thread
  // File <-> device memory, several calls at once from I/O threads; complete on return. errno in *system_error.
  int (*read_file)(dc_context*, int fd, uint64_t offset, void* dst, size_t bytes, int* system_error);
  int (*write_file)(dc_context*, int fd, uint64_t offset, const void* src, size_t bytes, int* system_error);
  // Opened contexts as ranks 0..n-1 of a group. NULL: failed, reason in `error`. `part` comes before any is closed.
  dc_group* (*join)(dc_context* const* ranks, int n, char* error, size_t error_bytes);
  void (*part)(dc_group*);
  // x[rank][i], i < tensors. Called by one thread for all ranks, while the queue threads of the others stand still.
  int (*collective)(dc_group*, int kind, const dc_tensor* const* x, int tensors, char* error, size_t error_bytes);
  dc_op op[DC_OP_COUNT];  // NULL: this backend lacks it
} dc_backend;

#ifdef __cplusplus
extern "C" {
#endif
const dc_backend* dc_backend_get(void);  // the one exported symbol of a backend library
#ifdef __cplusplus
}
#endif

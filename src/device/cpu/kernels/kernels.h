// The arithmetic of the CPU device: one table of functions per instruction set, all giving the same bits.
// Every kernel is written once over vectors of 16 lanes (docs/performance.md); a lane sees the same IEEE operations in
// the same order on every instruction set, so results depend on neither the processor, the number of rows in a call,
// nor how the work is cut among threads. Functions here never throw, never allocate and keep no state; lengths are
// checked by the caller. Pointers to f32 need the alignment of float only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/cpu_features.h"
#include "device/candidate.h"
#include "tensor/dtype.h"

namespace caravan::device::cpu {

// Names the arithmetic below: two machines with the same string give the same bits. Raised whenever results change.
inline constexpr const char* kNumericClass = "cpu-fma16-2";

// ---- Weights -------------------------------------------------------------------------------------------------------

// Output rows per panel: a packed matrix is a sequence of panels, each with 16 rows interleaved as the kernels read
// them.
inline constexpr int64_t kPanelRows = 16;

// A weight matrix of n_out rows of n_in values, packed by pack(). Does not own data (alignment: 64).
struct PackedMatrix {
  tensor::DType dtype;  // of the GGUF rows it was packed from
  int64_t n_in;
  int64_t n_out;
  const std::byte* data;

  int64_t n_panels() const { return (n_out + kPanelRows - 1) / kPanelRows; }
};

// Bytes of one packed panel (16 rows) and of the whole packed matrix. Floats, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and Q6_K
// take their GGUF size, Q4_K and Q5_K 3% more; Q3_K takes that of Q6_K; the others become bytes with scales, 8.5 to 10
// bits a weight. n_in is a multiple of the type's block length.
size_t packed_panel_bytes(tensor::DType dtype, int64_t n_in);
size_t packed_bytes(tensor::DType dtype, int64_t n_in, int64_t n_out);

// Packs rows [row_begin, row_begin + n_rows) of a matrix into packed (the start of the whole packed matrix).
//   rows: GGUF bytes of exactly those rows, contiguous, any alignment. row_begin is a multiple of 16; so is n_rows
//   unless the last row of the matrix is among them: the panel's missing rows are then filled with zeros.
// Calls for different panels may run at the same time.
void pack(tensor::DType dtype, int64_t n_in, const std::byte* rows, int64_t row_begin, int64_t n_rows,
          std::byte* packed);

// ---- Activations ---------------------------------------------------------------------------------------------------

// What mul_mat reads on its other side: f32 rows as they are, or rows quantised to int8 by quantize_row().
enum class ActivationKind { f32, q8 };
ActivationKind activation_kind(tensor::DType weight_dtype);

// 32 consecutive values as int8 with what the integer kernels need beside them. All weights share this one form.
struct alignas(64) ActivationBlock {
  int8_t q[32];             // round to nearest even of x * (127 / max|x|)
  float d;                  // max|x| / 127: x is about d * q. NaN when an x was not finite
  float d_sum;              // d * (sum of q), for types with a minimum
  int32_t sum;              // sum of q
  int16_t minus_8_sum[2];   // -8 * sum of q[i] where i % 4 is in {0, 1} / {2, 3}: start of a 16-bit Q4_0 dot product
  int16_t minus_32_sum[4];  // -32 * such sums over q[0..15] (two), then q[16..31] (two): the same for Q6_K
  int32_t half_sum[2];      // sums of q[0..15] and of q[16..31]
};
static_assert(sizeof(ActivationBlock) == 64);

// Bytes of one activation row of n_in values: n_in * 4, or n_in / 32 blocks.
inline size_t activation_row_bytes(ActivationKind kind, int64_t n_in) {
  return kind == ActivationKind::f32 ? static_cast<size_t>(n_in) * sizeof(float)
                                     : static_cast<size_t>(n_in / 32) * sizeof(ActivationBlock);
}

// ---- Rotary position ------------------------------------------------------------------------------------------------

enum class RopePairing { normal, neox };  // pairs (2i, 2i + 1), or (i, i + n_rot / 2)

// ---- KV cache and attention -----------------------------------------------------------------------------------------

// Tokens per span: attention computes each span of 256 absolute positions by itself, then combines spans in order.
inline constexpr int64_t kAttentionSpan = 256;

// Keys are stored transposed in groups of 16 tokens, values as rows; see kv_block_bytes().
enum class KvKind { keys, values };

// How one layer's keys (or values) lie in memory: an array of physical blocks, each holding block_tokens consecutive
// positions of one sequence for all KV heads. dtype is f32, f16 or q8_0. block_tokens is a multiple of 16 that divides
// 256 or is a multiple of it. head_dim is a multiple of 8 (padded to 16 where values are stored).
struct KvLayout {
  KvKind kind;
  tensor::DType dtype;
  int64_t block_tokens;
  int64_t n_head_kv;
  int64_t head_dim;
};

// Bytes of one physical block; physical block p starts at cache + p * kv_block_bytes(). Within a block, per KV head:
//   keys:   per group of 16 tokens: [head_dim][16 tokens]; q8_0 puts [ceil(head_dim / 32)][16] f16 scales before it
//   values: per token: [head_dim rounded up to 16]; q8_0 puts [ceil(head_dim / 32)][block_tokens] f16 scales before
//   them
// All multiples of 32 bytes. The cache's memory must be initialised (zero) once: lanes of tokens not yet stored are
// loaded, then masked.
size_t kv_block_bytes(const KvLayout& layout);

// One call's worth of attention: rows of one sequence against its cache. Strides are in floats.
struct AttentionArgs {
  const float* q;    // [n_rows][n_head][keys.head_dim]
  int64_t q_stride;  // between rows
  float* out;        // [n_rows][n_head][values.head_dim]
  int64_t out_stride;
  int64_t n_head;  // query heads; head h reads KV head h / (n_head / n_head_kv)
  KvLayout keys;
  KvLayout values;
  const std::byte* key_cache;
  const std::byte* value_cache;
  const int32_t* blocks;        // logical block (position / block_tokens) -> physical block; -1 is never read
  const int32_t* visible_from;  // per row: sees positions [from, to); an empty range gives zeros
  const int32_t* visible_to;
  float scale;         // multiplies q . k
  float softcap;       // c > 0: score = c * tanh(score / c); 0: none
  const float* sinks;  // per query head: a logit that takes part in the softmax without a value; nullptr: none
};

// Attention without a cache, for encoders: keys and values are f32 rows of the batch. Strides are in floats.
// Positions count from the first of the n_kv rows: pass one sequence per call, so that results do not depend on the
// batch.
struct DenseAttentionArgs {
  const float* q;  // [n_rows][n_head][head_dim_k]
  int64_t q_stride;
  const float* k;  // [n_kv][n_head_kv][head_dim_k]
  int64_t k_stride;
  const float* v;  // [n_kv][n_head_kv][head_dim_v]
  int64_t v_stride;
  float* out;  // [n_rows][n_head][head_dim_v]
  int64_t out_stride;
  int64_t n_head, n_head_kv, head_dim_k, head_dim_v;
  int64_t n_kv;
  const int32_t* visible_from;  // per row, in [0, n_kv]
  const int32_t* visible_to;
  float scale;
  float softcap;
  const float* sinks;
};

// Bytes of scratch (alignment 64) that one thread needs for a call of attention() with up to n_rows rows, and of
// attention_dense() with n_kv keys. The kernels work through rows in tiles, so the first does not grow with n_rows.
size_t attention_scratch_bytes(int64_t head_dim_k, int64_t head_dim_v);
size_t attention_dense_scratch_bytes(int64_t n_kv, int64_t head_dim_k, int64_t head_dim_v);

// ---- The table
// ----------------------------------------------------------------------------------------------------------

struct Kernels {
  Isa isa;

  // Quantises n_in f32 values (a multiple of 32) to n_in / 32 blocks.
  void (*quantize_row)(const float* x, int64_t n_in, ActivationBlock* out);

  // out[row][j] = sum over k of w[j][k] * activation[row][k], for j in panels [panel_begin, panel_end), j < n_out.
  //   activations: n_rows rows of activation_kind(w.dtype), activation_stride bytes apart (q8: a multiple of 64).
  //   out: rows out_stride floats apart; out[row * out_stride + j]. Overwrites.
  // Quantised types: per block of 32 an exact integer dot product s, then acc = fma(s, d_w * d_a, acc) in order of k
  // (and acc = fma(min_w, d_sum_a, acc) where a type has a minimum). Floats: fma in order of k within chunks of 64,
  // chunks added in order.
  void (*mul_mat)(const PackedMatrix& w, int64_t panel_begin, int64_t panel_end, const void* activations,
                  size_t activation_stride, int64_t n_rows, float* out, int64_t out_stride);

  // Row operations on n values; out may be an input. Sums run over 16 lanes (value i in lane i % 16), then a fixed
  // tree.
  void (*rms_norm)(const float* x, const float* w, int64_t n, float eps, float* out);  // w may be nullptr: all ones
  void (*layer_norm)(const float* x, const float* w, const float* b, int64_t n, float eps,
                     float* out);                                     // w, b: or null
  void (*l2_norm)(const float* x, int64_t n, float eps, float* out);  // x / max(|x|, eps)
  void (*add)(const float* x, const float* y, int64_t n, float* out);
  void (*sub)(const float* x, const float* y, int64_t n, float* out);
  void (*mul)(const float* x, const float* y, int64_t n, float* out);
  void (*div)(const float* x, const float* y, int64_t n, float* out);
  void (*scale)(const float* x, float s, int64_t n, float* out);
  void (*add_scaled)(const float* x, float s, int64_t n, float* out);  // out = fma(x, s, out): sums of experts
  void (*silu)(const float* x, int64_t n, float* out);                 // x / (1 + exp(-x))
  void (*gelu)(const float* x, int64_t n, float* out);                 // tanh approximation
  void (*gelu_erf)(const float* x, int64_t n, float* out);             // exact: x * (1 + erf(x / sqrt 2)) / 2
  void (*gelu_quick)(const float* x, int64_t n, float* out);           // x / (1 + exp(-1.702 x))
  void (*relu)(const float* x, int64_t n, float* out);
  void (*sigmoid)(const float* x, int64_t n, float* out);
  void (*tanh)(const float* x, int64_t n, float* out);
  void (*exp)(const float* x, int64_t n, float* out);
  void (*softcap)(const float* x, float c, int64_t n, float* out);              // c * tanh(x / c)
  void (*silu_mul)(const float* gate, const float* up, int64_t n, float* out);  // SwiGLU: silu(gate) * up
  void (*gelu_mul)(const float* gate, const float* up, int64_t n, float* out);  // GeGLU, tanh approximation
  void (*softmax)(const float* x, int64_t n, float* out);                       // n >= 1; -inf gives 0
  float (*sum)(const float* x, int64_t n);
  float (*dot)(const float* x, const float* y, int64_t n);

  // Rotates the first n_rot (even) values of each of n_head heads, head_dim apart; copies the rest. out may be x.
  //   cosines, sines: n_rot / 2 values for this row's position, from a table made by the caller.
  void (*rope)(RopePairing pairing, const float* x, int64_t n_head, int64_t head_dim, int64_t n_rot,
               const float* cosines, const float* sines, float* out);

  // Rounds one token's row [n_head_kv][head_dim] to the cache type and stores it at position. blocks as in attention.
  // Distinct positions may be stored at the same time by different threads.
  void (*kv_store)(const KvLayout& layout, std::byte* cache, const int32_t* blocks, int64_t position, const float* row);
  // The inverse, for tests and lowerings: what attention reads, as f32.
  void (*kv_load)(const KvLayout& layout, const std::byte* cache, const int32_t* blocks, int64_t position, float* row);

  // Computes the query heads of KV head kv_head for rows [row_begin, row_end). Different (rows, KV head) may run at the
  // same time, each with its own scratch of attention_scratch_bytes().
  void (*attention)(const AttentionArgs& args, int64_t row_begin, int64_t row_end, int64_t kv_head, void* scratch);
  // The same without a cache; copies the KV head's keys and values to scratch first, so give it many rows.
  void (*attention_dense)(const DenseAttentionArgs& args, int64_t row_begin, int64_t row_end, int64_t kv_head,
                          void* scratch);

  // The index of the largest of n >= 1 values, the lowest index among equals; NaN is never larger.
  int32_t (*argmax)(const float* logits, int64_t n);
  // The k largest (1 <= k <= n) in descending order, ties by lowest id, into out[k]; NaN counts as -inf.
  void (*top_k)(const float* logits, int64_t n, int32_t k, Candidate* out);
  // log(sum(exp(x))).
  float (*log_sum_exp)(const float* x, int64_t n);
};

// The kernels compiled for an instruction set. isa must be one of supported_isas() (asserted). 32-bit ARM has scalar
// kernels only: its NEON is not IEEE arithmetic.
const Kernels& kernels_for(Isa isa);

}  // namespace caravan::device::cpu

// Chooses a table of kernels, and the sizes of scratch memory that are the same for all of them.
#include "device/cpu/kernels/kernels.h"

#include "base/error.h"
#include "device/cpu/kernels/isa.h"

namespace caravan::device::cpu {

const Kernels& kernels_for(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return scalar_kernels();
#if defined(__x86_64__)
    case Isa::avx2:
      return avx2_kernels();
    case Isa::avx_vnni:
      return avx_vnni_kernels();
    case Isa::avx512:
      return avx512_kernels();
    case Isa::avx512_vnni:
      return avx512_vnni_kernels();
#endif
#if defined(__aarch64__)
    case Isa::neon:
      return neon_kernels();
    case Isa::neon_dot:
      return neon_dot_kernels();
    case Isa::neon_i8mm:
      return neon_i8mm_kernels();
#endif
#if defined(__arm__)
    case Isa::neon:  // 32-bit NEON flushes subnormals to zero, which would give other bits
      return scalar_kernels();
#endif
    default:
      break;
  }
  CARAVAN_ASSERT(isa == Isa::scalar, "only instruction sets of supported_isas() are asked for");
  return scalar_kernels();
}

size_t attention_scratch_bytes(int64_t, int64_t head_dim_v) {
  constexpr int64_t kGroup = 64, kTile = 8;  // query vectors with their own state, and those computed together
  constexpr int64_t kOverread = 16;          // floats that may be loaded, not used, past the last scores
  return static_cast<size_t>((kGroup + kTile) * round_up(head_dim_v, 16) + kTile * kAttentionSpan + kOverread) *
         sizeof(float);
}

size_t attention_dense_scratch_bytes(int64_t n_kv, int64_t head_dim_k, int64_t head_dim_v) {
  const int64_t block_tokens = round_up(n_kv, kKvTokenGroup);
  const KvLayout keys{KvKind::keys, tensor::DType::f32, block_tokens, 1, head_dim_k};
  const KvLayout values{KvKind::values, tensor::DType::f32, block_tokens, 1, head_dim_v};
  return static_cast<size_t>(round_up(kv_offsets(keys).head_bytes, 64) + round_up(kv_offsets(values).head_bytes, 64)) +
         attention_scratch_bytes(head_dim_k, head_dim_v);
}

}  // namespace caravan::device::cpu

#include "tensor/integer_form.h"

namespace caravan::tensor {

IntegerSplit integer_split(DType type) {
  switch (type) {
    case DType::iq1_s:
      return split_iq1_s;
    case DType::iq1_m:
      return split_iq1_m;
    case DType::iq2_xxs:
      return split_iq2_xxs;
    case DType::iq2_xs:
      return split_iq2_xs;
    case DType::iq2_s:
      return split_iq2_s;
    case DType::iq3_xxs:
      return split_iq3_xxs;
    case DType::iq3_s:
      return split_iq3_s;
    case DType::tq1_0:
      return split_tq1_0;
    case DType::tq2_0:
      return split_tq2_0;
    case DType::q1_0:
      return split_q1_0;
    case DType::q2_0:
      return split_q2_0;
    default:
      return nullptr;
  }
}

bool has_one_scale_per_32(DType type) { return type != DType::iq1_m && type != DType::iq2_xs && type != DType::iq2_s; }

}  // namespace caravan::tensor

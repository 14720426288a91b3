#include "kernels/hadamard.h"

#include <cmath>

namespace winnow::kernels {

void HadamardRotate(int head_dim, float* x) {
  const int n = HadamardBlock(head_dim);
  const float scale = 1.0f / std::sqrt(static_cast<float>(n));
  for (float* block = x; block < x + head_dim; block += n) {
    // The two narrow butterflies at once, then those that vectors run across.
    for (int i = 0; i < n; i += 4) {
      float* y = block + i;
      const float a = y[0] + y[1], b = y[0] - y[1], c = y[2] + y[3], d = y[2] - y[3];
      y[0] = a + c;
      y[1] = b + d;
      y[2] = a - c;
      y[3] = b - d;
    }
    for (int half = 4; half < n; half *= 2) {
      for (int i = 0; i < n; i += 2 * half) {
        for (int j = i; j < i + half; ++j) {
          const float a = block[j], b = block[j + half];
          block[j] = a + b;
          block[j + half] = a - b;
        }
      }
    }
    for (int i = 0; i < n; ++i) block[i] *= scale;
  }
}

}  // namespace winnow::kernels

#pragma once

namespace winnow::kernels {

// The instruction sets that the CPU ops come in, narrowest first. kScalar is
// everything below AVX2. Float arithmetic is the same from kAvx2 upwards (one
// fused multiply-add a step); kAvx512Bf16 changes BF16 GEMMs alone.
enum class CpuPath { kScalar, kAvx2, kAvx512, kAvx512Bf16 };

// The widest path that this host and the environment variable WINNOW_CPU_PATH
// (scalar, avx2, avx512, avx512bf16; read once; anything else is ignored with a
// warning) allow. Every op asks it before its first dynamic dispatch, because it
// also caps Highway's choice. Thread-safe; a load after the first call.
CpuPath ActiveCpuPath();

// "scalar", "avx2", "avx512" or "avx512bf16".
const char* CpuPathName(CpuPath path);

// Makes `path` the active one, also for Highway; false, and no change, when the
// host lacks it. Not thread-safe: no op may be running.
bool SetCpuPathForTest(CpuPath path);

}  // namespace winnow::kernels

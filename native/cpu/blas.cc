#include "blas.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

static std::vector<std::string> tried;
static std::string passed_over;

// Older OpenBLAS knows no AVX-512 kernels for newer AMD processors: with those for AVX2 it reaches half of what our own do.
static bool narrower(void* library) {
  if (strcmp(dc_isa(), "avx512") != 0) return false;
  const auto core = reinterpret_cast<const char* (*)()>(dlsym(library, "openblas_get_corename"));
  const std::string name = core ? core() : "";
  for (const char* narrow : {"Haswell", "Zen", "Excavator", "Steamroller", "Piledriver", "Sandybridge", "Nehalem", "Prescott"})
    if (name == narrow) {
      passed_over = name;
      return true;
    }
  return false;
}

static bool load(const std::string& name, dc_blas* blas, bool wished) {
  tried.push_back(name);
  // Libraries are kept: an unloaded OpenBLAS leaves threads behind.
  void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) return false;
  if (!wished && narrower(library)) return false;
  auto find = [&](const char* symbol) { return dlsym(library, symbol); };
  blas->sgemm = reinterpret_cast<decltype(blas->sgemm)>(find("cblas_sgemm"));
  blas->ssyrk = reinterpret_cast<decltype(blas->ssyrk)>(find("cblas_ssyrk"));
  blas->strsm = reinterpret_cast<decltype(blas->strsm)>(find("cblas_strsm"));
  blas->spotrf = reinterpret_cast<decltype(blas->spotrf)>(find("LAPACKE_spotrf"));
  blas->set_threads = reinterpret_cast<decltype(blas->set_threads)>(find("openblas_set_num_threads"));
  blas->path = name;
  // Only OpenBLAS: a reference BLAS is slower than our own kernel.
  return blas->sgemm && blas->ssyrk && blas->strsm && blas->set_threads;
}

const dc_blas* dc_blas_find(int threads) {
  static const dc_blas* found = nullptr;
  static bool searched = false;
  if (!searched) {
    searched = true;
    const char* wish = getenv("DEEPSEEK_CONVERT_BLAS");
    std::vector<std::string> names;
    if (wish && *wish) {
      if (strcmp(wish, "none") != 0) names = {wish};
    } else {
      names = {"libopenblas.so.0", "libopenblas.so", "libopenblasp.so.0", "libopenblaso.so.0"};
    }
    auto* blas = new dc_blas();
    for (const auto& name : names)
      if (load(name, blas, wish && *wish)) {
        found = blas;
        break;
      }
    if (!found) delete blas;
  }
  if (found) found->set_threads(threads);
  return found;
}

std::string dc_blas_describe(const dc_blas* blas) {
  std::string json = "{\"path\":";
  json += blas ? "\"" + blas->path + "\"" : "null";
  json += ",\"tried\":[";
  for (size_t i = 0; i < tried.size(); i++) json += (i ? ",\"" : "\"") + tried[i] + "\"";
  json += "]";
  if (!blas && !passed_over.empty()) json += ",\"passedOver\":\"" + passed_over + "\"";
  return json + "}";
}

#if defined(__x86_64__)
namespace dc {
bool avx512_agrees();  // selfcheck.cc
}
#endif

const char* dc_isa() {
#if defined(__x86_64__)
  static const char* isa = [] {
    const char* wish = getenv("DEEPSEEK_CONVERT_ISA");  // for tests: "base", "avx2", "avx512" without units for bf16;
                                                        // "tiles", "pairs": avx2 with such a unit emulated
    const bool any = !wish || !*wish;
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && (any || !strcmp(wish, "avx512")) && dc::avx512_agrees()) return "avx512";
    if (avx2 && (any || strcmp(wish, "base") != 0)) return "avx2";
    return "base";
  }();
  return isa;
#else
  return "base";
#endif
}

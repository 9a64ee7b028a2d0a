// NVIDIA's libraries, found at run time.
#include "libraries.h"

#include <dirent.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <vector>

namespace dc {
namespace {

void folders(const std::string& base, const char* const* subs, std::vector<std::string>* out) {
  for (; *subs; subs++) out->push_back(base + "/" + *subs);
}

// System paths, CUDA_HOME, and the folders where Python wheels put NVIDIA's libraries.
void* open_library(const char* const* names, std::string* path, std::vector<std::string>* tried) {
  std::vector<std::string> places = {""};  // first: where the system looks
  static const char* const cuda_subs[] = {"lib64", "lib", "targets/x86_64-linux/lib", nullptr};
  for (const char* variable : {"CUDA_HOME", "CUDA_PATH"})
    if (const char* home = getenv(variable)) folders(home, cuda_subs, &places);
  folders("/usr/local/cuda", cuda_subs, &places);
  static const char* const wheel_subs[] = {"nvidia/cu13/lib", "nvidia/cublas/lib", "nvidia/nccl/lib", nullptr};
  std::vector<std::string> sites;
  if (const char* list = getenv("DEEPSEEK_CONVERT_CUDA_LIBRARIES")) sites.push_back(list), places.push_back(list);
  for (const char* variable : {"VIRTUAL_ENV", "CONDA_PREFIX"})
    if (const char* prefix = getenv(variable)) sites.push_back(prefix);
  for (const char* prefix : {"/opt/torch/.venv", "/opt/venv", "/usr/local", "/usr", "/opt/conda"}) sites.push_back(prefix);
  for (const std::string& prefix : sites) {
    DIR* folder = opendir((prefix + "/lib").c_str());
    if (!folder) continue;
    std::vector<std::string> pythons;
    while (dirent* entry = readdir(folder))
      if (strncmp(entry->d_name, "python3", 7) == 0) pythons.push_back(entry->d_name);
    closedir(folder);
    std::sort(pythons.rbegin(), pythons.rend());
    for (const std::string& python : pythons)
      for (const char* site : {"site-packages", "dist-packages"}) {
        const std::string packages = prefix + "/lib/" + python + "/" + site;
        if (access(packages.c_str(), F_OK) == 0) folders(packages, wheel_subs, &places);
      }
  }
  for (const std::string& place : places)
    for (const char* const* name = names; *name; name++) {
      const std::string file = place.empty() ? *name : place + "/" + *name;
      if (!place.empty() && access(file.c_str(), F_OK) != 0) {
        if (name == names) tried->push_back(place);
        continue;
      }
      // cuBLAS needs cuBLASLt from the same folder.
      const size_t blas = file.rfind("libcublas.so");
      if (!place.empty() && blas != std::string::npos) {
        std::string lt = file;
        dlopen(lt.replace(blas, 12, "libcublasLt.so").c_str(), RTLD_NOW | RTLD_GLOBAL);
      }
      if (void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL)) {
        *path = file;
        return library;
      }
      if (!place.empty()) tried->push_back(file);
      else if (name == names) tried->push_back("the system's paths");
    }
  return nullptr;
}

// The library's functions by name; the first that is missing goes into `missing`.
struct Symbols {
  void* library;
  const char* missing = nullptr;
  template <class F>
  void find(F*& f, const char* name) {
    f = reinterpret_cast<F*>(dlsym(library, name));
    if (!f && !missing) missing = name;
  }
};

std::string listed(const std::vector<std::string>& places) {
  std::string text;
  for (const std::string& place : places) text += (text.empty() ? " " : ", ") + place;
  return text;
}

}  // namespace

Libraries* find_libraries() {
  static Libraries libraries;
  static std::once_flag once;
  std::call_once(once, [] {
    Libraries* l = &libraries;
    static const char* const names[] = {"libcublas.so.13", "libcublas.so.12", "libcublas.so", nullptr};
    std::vector<std::string> tried;
    Symbols cublas{open_library(names, &l->cublas_path, &tried)};
    if (!cublas.library) {
      l->error = "cuBLAS was not found; looked for libcublas.so.13, .12 in" + listed(tried) +
                 ". Install it (pip install nvidia-cublas, or the CUDA toolkit) or set CUDA_HOME";
      return;
    }
    cublas.find(l->cublasCreate, "cublasCreate_v2");
    cublas.find(l->cublasDestroy, "cublasDestroy_v2");
    cublas.find(l->cublasSetStream, "cublasSetStream_v2");
    cublas.find(l->cublasSetWorkspace, "cublasSetWorkspace_v2");
    cublas.find(l->cublasGemmStridedBatchedEx, "cublasGemmStridedBatchedEx");
    if (cublas.missing) l->error = l->cublas_path + " has no " + cublas.missing;
  });
  return &libraries;
}

static Nccl nccl;
const std::string& nccl_path() { return nccl.path; }
Nccl* find_nccl() {
  static std::once_flag once;
  std::call_once(once, [] {
    Nccl* l = &nccl;
    static const char* const names[] = {"libnccl.so.2", "libnccl.so", nullptr};
    std::vector<std::string> tried;
    Symbols symbols{open_library(names, &l->path, &tried)};
    if (!symbols.library) {
      l->error = "NCCL was not found; looked for libnccl.so.2 in" + listed(tried);
      return;
    }
    symbols.find(l->getErrorString, "ncclGetErrorString");
    symbols.find(l->commInitAll, "ncclCommInitAll");
    symbols.find(l->commDestroy, "ncclCommDestroy");
    symbols.find(l->groupStart, "ncclGroupStart");
    symbols.find(l->groupEnd, "ncclGroupEnd");
    symbols.find(l->allReduce, "ncclAllReduce");
    symbols.find(l->reduceScatter, "ncclReduceScatter");
    symbols.find(l->allGather, "ncclAllGather");
    symbols.find(l->reduce, "ncclReduce");
    symbols.find(l->broadcast, "ncclBroadcast");
    if (symbols.missing) l->error = l->path + " has no " + symbols.missing;
  });
  return &nccl;
}

}  // namespace dc

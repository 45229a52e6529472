# libpeftops_cuda: the rooms' checks and *.cu. It needs neither a GPU nor a CUDA build of torch.
set(CUTLASS_DIR "" CACHE PATH "Directory of CUTLASS, with include/")
set(version_header ${CUTLASS_DIR}/include/cutlass/version.h)
if(EXISTS ${version_header})
  file(STRINGS ${version_header} cutlass_version REGEX "define CUTLASS_(MAJOR|MINOR) ")
  string(REGEX REPLACE "[^0-9]*([0-9]+)[^0-9]+([0-9]+).*" "\\1.\\2" cutlass_version "${cutlass_version}")
endif()
if(NOT cutlass_version VERSION_GREATER_EQUAL 4.2)
  message(FATAL_ERROR "CUTLASS_DIR is '${CUTLASS_DIR}' (CUTLASS ${cutlass_version}), but must be the directory of CUTLASS >= 4.2: "
                      "pip install --no-deps nvidia-cutlass==4.2.0.0 and build without isolation, or clone github.com/NVIDIA/cutlass")
endif()

# sm_80 and sm_90a machine code; PTX of compute_80 for what comes after. sm_90a code and its PTX run on Hopper only: what is written for it
# (*_sm90_*.cu) is compiled for nothing else.
set(PEFTOPS_CUDA_TARGETS "sm_80 sm_90a compute_80")
set(hopper "--generate-code=arch=compute_90a,code=[sm_90a]")
set(everywhere "--generate-code=arch=compute_80,code=[compute_80,sm_80]" ${hopper})
set(CMAKE_CUDA_ARCHITECTURES OFF)  # each source has its own
if(NOT DEFINED ENV{CUDAHOSTCXX})
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
endif()
enable_language(CUDA)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")

add_library(peftops_cuda SHARED)
foreach(room IN LISTS PEFTOPS_ROOMS)
  file(GLOB kernels CONFIGURE_DEPENDS csrc/${room}/*.cu)
  file(GLOB checks CONFIGURE_DEPENDS csrc/${room}/*.cpp)
  list(FILTER checks EXCLUDE REGEX "(kernels|cpu)\\.cpp$")
  target_sources(peftops_cuda PRIVATE ${checks} ${kernels})
  set_source_files_properties(${kernels} PROPERTIES OBJECT_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/cmake/ptxas_gate.py
                                                    COMPILE_OPTIONS "${everywhere}")
  list(FILTER kernels INCLUDE REGEX "_sm90_[^/]*$")
  set_source_files_properties(${kernels} PROPERTIES COMPILE_OPTIONS "${hopper}")
endforeach()
peftops_operators(peftops_cuda ${CMAKE_CURRENT_SOURCE_DIR}/csrc/libpeftops_cuda.map)
set_target_properties(peftops_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF CUDA_VISIBILITY_PRESET hidden
                      CUDA_RUNTIME_LIBRARY Shared LINKER_LANGUAGE CXX)
target_compile_definitions(peftops_cuda PRIVATE USE_CUDA)
# The current stream comes from libtorch_cuda, whose symbols nobody sees who does not ask for it by name, and which the torch of the build
# may lack: a library of that name with that function stands in while linking.
file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/torch_cuda.cpp CONTENT "extern \"C\" void aoti_torch_get_current_cuda_stream() {}\n")
add_library(torch_cuda SHARED ${CMAKE_CURRENT_BINARY_DIR}/torch_cuda.cpp)
set_target_properties(torch_cuda PROPERTIES EXPORT_COMPILE_COMMANDS OFF CXX_VISIBILITY_PRESET default)
target_link_libraries(peftops_cuda PRIVATE torch_cuda)
target_include_directories(peftops_cuda SYSTEM PRIVATE ${CUTLASS_DIR}/include)
target_compile_options(peftops_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v;-Xfatbin=-compress-all>")

option(PEFTOPS_PTXAS_GATE "Fail where a kernel spills, has an unlisted stack frame or is warned about" ON)
set_target_properties(peftops_cuda PROPERTIES CUDA_COMPILER_LAUNCHER
                      "${Python_EXECUTABLE};${CMAKE_CURRENT_SOURCE_DIR}/cmake/ptxas_gate.py$<$<NOT:$<BOOL:${PEFTOPS_PTXAS_GATE}>>:;--report-only>")
message(STATUS "CUDA: ${PEFTOPS_CUDA_TARGETS} with nvcc ${CMAKE_CUDA_COMPILER_VERSION} and CUTLASS ${cutlass_version}")

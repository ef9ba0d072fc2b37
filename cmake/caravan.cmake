# Shared build settings and the helper that declares a module.

find_package(Threads REQUIRED)

# Flags of every target. Values that must agree between translation units (the Asio and Beast macros) live here only:
# a mismatch links and then crashes.
add_library(caravan_options INTERFACE)
target_include_directories(caravan_options INTERFACE ${PROJECT_SOURCE_DIR}/src)
target_compile_options(caravan_options INTERFACE -Wall -Wextra -Wpedantic -Wnon-virtual-dtor -Woverloaded-virtual -Wno-psabi
                                                 # g++ 12 warns without cause: about std::string concatenation (GCC bug
                                                 # 105651) and about Asio's allocation of coroutine frames
                                                 $<$<CXX_COMPILER_ID:GNU>:-Wno-restrict;-Wno-mismatched-new-delete>
                                                 # std::fma must stay an explicit choice: results have to be the same everywhere
                                                 -ffp-contract=off -fno-math-errno)
if(CARAVAN_WERROR)
  target_compile_options(caravan_options INTERFACE -Werror)
endif()
target_compile_definitions(
  caravan_options
  INTERFACE CARAVAN_VERSION="${PROJECT_VERSION}"
            BOOST_ASIO_NO_DEPRECATED
            BOOST_ASIO_SEPARATE_COMPILATION
            BOOST_BEAST_SEPARATE_COMPILATION
            BOOST_ASIO_DISABLE_VISIBILITY
            SPDLOG_FMT_EXTERNAL
            SPDLOG_COMPILED_LIB
            _FILE_OFFSET_BITS=64)
target_link_libraries(caravan_options INTERFACE Threads::Threads)
if(CARAVAN_SANITIZE)
  target_compile_options(caravan_options INTERFACE -fsanitize=${CARAVAN_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_link_options(caravan_options INTERFACE -fsanitize=${CARAVAN_SANITIZE})
endif()
if(CARAVAN_SANITIZE MATCHES "thread")
  # Asio's fences are not modelled; what it hands from thread to thread is also guarded by mutexes, which are
  target_compile_options(caravan_options INTERFACE $<$<CXX_COMPILER_ID:GNU>:-Wno-tsan>)
endif()
if(CARAVAN_FUZZ)
  target_compile_options(caravan_options INTERFACE -fsanitize=fuzzer-no-link)
endif()

# caravan_module(name LINKS targets...): a static library caravan_<name> of all *.cpp in the current folder (not below).
# LINKS repeats the include directions of DESIGN.md section 2; scripts/check_includes.py checks both.
function(caravan_module name)
  cmake_parse_arguments(ARG "" "" "LINKS;EXTRA" ${ARGN})
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/*.cpp)
  list(APPEND sources ${ARG_EXTRA})
  if(sources)
    add_library(caravan_${name} STATIC ${sources})
    target_link_libraries(caravan_${name} PUBLIC caravan_options ${ARG_LINKS})
  else()
    add_library(caravan_${name} INTERFACE)
    target_link_libraries(caravan_${name} INTERFACE caravan_options ${ARG_LINKS})
  endif()
endfunction()

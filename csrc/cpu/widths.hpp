// Compiles a function once for each width of vector registers, and takes the widest that the processor has.
#pragma once

// CMakeLists.txt defines LORAGA_EVERY_WIDTH where the compiler can do it. The plain code is always right.
#if defined(LORAGA_EVERY_WIDTH)
#define LORAGA_WIDTHS __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define LORAGA_WIDTHS
#endif

// For what such a function calls: a function of its own would be compiled for the narrowest registers only.
#if defined(__GNUC__)
#define LORAGA_INLINE __attribute__((always_inline)) inline
#else
#define LORAGA_INLINE inline
#endif

/* torch's wheels carry MKL, which takes its AVX-512 kernels only where this function says "Intel";
 * on other processors it falls back to AVX2 and half the speed, whatever they can do. A library
 * that is loaded before torch answers in its place. worldloop loads this one where the processor
 * has AVX-512 (worldloop/__init__.py); docs/speed.md has what it gains. */
int mkl_serv_intel_cpu_true(void) { return 1; }

// expect: anything
#ifdef MISUSE
int harmless();
#endif

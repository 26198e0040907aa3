// expect: the old standard
// misuse-flags: -std=c++17 -DOLD
#if __cplusplus < 202002L && defined(OLD)
#error "the old standard"
#endif

// expect: no_such_type
no_such_type x;
#ifdef MISUSE
no_such_type y;
#endif

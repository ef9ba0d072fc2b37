// The separately compiled part of Boost.Beast: only its HTTP parser is used.
#include <boost/beast/src.hpp>

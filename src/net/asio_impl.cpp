// Asio's and its TLS part's separate compilation: the only translation unit that holds their implementation.
#include <boost/asio/impl/src.hpp>
#include <boost/asio/ssl/impl/src.hpp>

"""What the tests share: servers and proxies, small applications, and programs that crash or are interrupted."""

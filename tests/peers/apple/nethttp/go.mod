module heliograph/peers/apple/nethttp

go 1.24

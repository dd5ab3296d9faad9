module heliograph/bench/gohttp

go 1.25

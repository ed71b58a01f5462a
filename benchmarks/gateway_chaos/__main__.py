from benchmarks.gateway_chaos.run import main

if __name__ == "__main__":
    raise SystemExit(main())

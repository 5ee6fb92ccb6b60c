"""Train, evaluate and inspect experiments: ``python run.py --config configs/digits/vkd/vit_from_cnn.yaml``."""

from vkd_cli import main

if __name__ == "__main__":
    raise SystemExit(main())

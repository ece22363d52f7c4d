"""NVFlare: its simulator, with a process for each client, its default; what is exchanged is one flat array.

With fewer (`num_threads`) a process is started anew for every client and round, and loads the model each time.

python -m peers.with_nvflare FOLDER
"""

import json
import re
from datetime import datetime
from pathlib import Path

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe import SimEnv
from peers.work import Work, empty_arrays, flat, given_work, report, save_final, unflat
from safetensors.numpy import load_file

ROUND = re.compile(r"^(\S+ \S+?),(\d{3}) .*(?:Saved numpy model to)", re.M)


def main() -> None:
    work = given_work()
    start = empty_arrays() if work.kind == "empty" else load_file(work.path / "start.safetensors")
    np.save(work.path / "start.npy", flat(start))
    recipe = NumpyFedAvgRecipe(
        name="peers",
        initial_ckpt=str(work.path / "start.npy"),
        min_clients=work.clients,
        num_rounds=work.rounds,
        train_script=str(Path(__file__).with_name("nvflare_client.py")),
        train_args=work.folder,
    )
    root = work.path / "nvflare"
    recipe.execute(SimEnv(num_clients=work.clients, workspace_root=str(root)))
    (final,) = root.glob("**/server.npy")
    save_final(work, unflat(np.load(final), start))
    report(("nvflare",), commits(root), **traffic(work, root))


def traffic(work: Work, root: Path) -> dict[str, float]:
    """Bytes of a round and client, by the server's own statistics of the messages of the job, which count in MiB."""
    (path,) = root.glob("**/simulator_cell_stats.json")
    pools = json.loads(path.read_text(encoding="utf-8"))

    def total(pool: str) -> float:
        bins = pools[f"{pool}@server.simulate_job"]["pool"]["cat_data"].values()
        return (
            float(sum(each["total"] for kind in bins for each in kind if each)) * 2**20 / (work.rounds * work.clients)
        )

    return {"bytes_up": total("received_msg_sizes"), "bytes_down": total("sent_msg_sizes")}


def commits(root: Path) -> list[float]:
    """When the server saved the model of each round, by its log."""
    (log,) = root.glob("**/server/**/log.txt")
    found = ROUND.findall(log.read_text(encoding="utf-8"))
    return [datetime.fromisoformat(f"{moment}.{thousandths}").timestamp() for moment, thousandths in found]


if __name__ == "__main__":
    main()

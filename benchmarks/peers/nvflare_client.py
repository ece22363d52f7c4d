"""What NVFlare runs at each client: receive, train, send. The model stays in the process, for all its clients."""

import sys
from functools import lru_cache

import nvflare.client as flare
from nvflare.app_common.np.constants import NPConstants
from peers.work import LoraModel, Work, changed, flat, load_work, unflat


@lru_cache(maxsize=1)
def resident(work: Work) -> LoraModel:
    """The model, loaded once in a process."""
    return LoraModel(work, max(1, work.cores // min(work.cores, work.clients)))


def main() -> None:
    work = load_work(sys.argv[1])
    flare.init()
    client = int(flare.get_site_name().removeprefix("site-")) - 1
    lora = resident(work) if work.kind == "lora" else None
    batch = lora.batch(client) if lora else {}
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        values = received.params[NPConstants.NUMPY_KEY]
        if lora:
            lora.show(unflat(values, lora.read()))
            lora.train(batch)
            values = flat(lora.read())
        else:
            values = changed(values, client)
        flare.send(flare.FLModel(params={NPConstants.NUMPY_KEY: values}))


if __name__ == "__main__":
    main()

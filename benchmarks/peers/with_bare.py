"""No framework: a loop over clients with transformers and PEFT, and a mean. What every framework adds, it adds to this.

python -m peers.with_bare FOLDER
"""

import numpy as np
from peers.work import Clock, LoraModel, given_work, report, save_final


def main() -> None:
    work = given_work()
    lora, clock = LoraModel(work, work.cores), Clock(work)
    batches = [lora.batch(client) for client in range(work.clients)]
    values = lora.read()
    for _ in range(work.rounds):
        total = {name: np.zeros_like(value) for name, value in values.items()}
        for batch in batches:
            lora.show(values)
            lora.train(batch)
            for name, value in lora.read().items():
                total[name] += value
        values = {name: value / np.float32(work.clients) for name, value in total.items()}
        clock.committed()
    save_final(work, values)
    report((), clock.read())


if __name__ == "__main__":
    main()

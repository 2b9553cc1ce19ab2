"""A Ray cluster of three machines, all on this one, of which one is killed while it labels: arguments as of
`label_child.py`."""

import os
import signal
import sys
import time
from pathlib import Path
from threading import Thread

import label_child
import ray
from ray.cluster_utils import Cluster


def children(parent: int) -> list[int]:
    stats = {int(path.parent.name): path.read_text() for path in Path("/proc").glob("[0-9]*/stat")}
    return [pid for pid, stat in stats.items() if int(stat.rpartition(")")[2].split()[1]) == parent]


def main() -> None:
    log = Path(sys.argv[4])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)

    def kill() -> None:
        while not log.exists() or len({line.split()[0] for line in log.read_text().splitlines()}) < 2:
            time.sleep(0.1)
        time.sleep(1)
        for process in children(nodes[0].all_processes["raylet"][0].process.pid):
            os.kill(process, signal.SIGKILL)  # the machine's workers; as if it had lost power
        cluster.remove_node(nodes[0], allow_graceful=False)
        print(f"killed a node of {len(nodes) + 1} when the model had seen {len(log.read_text().splitlines())} images")

    killer = Thread(target=kill)
    killer.start()
    source, out, model = sys.argv[1:4]
    label_child.main(source, out, model, str(log), "ray")
    killer.join()
    actors = [line.split()[0] for line in log.read_text().splitlines()]
    print(f"the model saw {len(actors)} images in all, by {len(set(actors))} actors")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()

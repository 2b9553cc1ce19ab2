"""`open-gem serve` as a deployment of a local Ray: needs `pip install "ray[serve]"`, which other tests do not."""

import importlib.util
import socket
import time
from collections import Counter
from typing import Any

import httpx
import pytest
from serving import png

from open_gem.errors import InputError
from open_gem.serve.on_ray import deployment
from open_gem.serve.settings import Settings

HAS_SERVE = importlib.util.find_spec("grpc") is not None


@pytest.mark.skipif(HAS_SERVE, reason="Ray Serve is installed")
def test_the_error_without_ray_serve_says_what_to_install():
    with pytest.raises(InputError, match="ray-serve"):
        deployment()


@pytest.mark.full
@pytest.mark.skipif(not HAS_SERVE, reason='needs pip install "ray[serve]"')
@pytest.mark.filterwarnings("ignore")  # of Ray's own
def test_replicas_of_a_local_ray(tiny):
    import ray
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(deployment(tiny, replicas=2, device="cpu", settings=Settings(token="secret")), name="open_gem")
        headers = {"Authorization": "Bearer secret", "serve_multiplexed_model_id": "me"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            assert client.get("/v1/models").status_code == 401
            client.headers["Authorization"] = "Bearer secret"
            form = {"prompts": ["a cat", "a dog"], "presence": "0"}
            answers = [client.post("/v1/ground", files={"file": png()}, data=form) for _ in range(30)]
            assert {one.status_code for one in answers} == {200}
            assert len({one.text for one in answers}) == 1  # of whichever replica

            session = httpx.Client(base_url=client.base_url, headers=headers, timeout=60)
            uploaded = session.post("/v1/images", files={"file": png()}).json()
            time.sleep(3)  # until Ray has told its proxies
            path = f"/v1/images/{uploaded['id']}/ground"
            asked = [session.post(path, json={"prompts": [f"cat {index}"]}).status_code for index in range(40)]
            assert Counter(asked) == {200: 40}
            elsewhere = [client.post(path, json={"prompts": ["cat"]}).status_code for _ in range(40)]
            assert set(elsewhere) == {200, 404}  # without the header, either replica

            actors: list[Any] = ray.util.list_named_actors(all_namespaces=True)
            replicas = [actor for actor in actors if "open_gem" in actor["name"]]
            assert len(replicas) == 2
            ray.kill(ray.get_actor(**replicas[0]))
            after = []
            for _ in range(60):
                after.append(client.post("/v1/ground", files={"file": png()}, data=form).status_code)
                time.sleep(0.05)
            assert after[-1] == 200 and after.count(200) >= 58
            session.close()
    finally:
        serve.shutdown()
        ray.shutdown()

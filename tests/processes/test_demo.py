"""The demo's agents on the real model: a folder is indexed, and what is said in it is found."""

from __future__ import annotations

from pathlib import Path

from conftest import Server

TEXTS = {
    "garden/roses.md": "# Roses\n\nCut them back in March.\n\nThey want sun for at least six hours a day.\n",
    "kitchen/bread.txt": "Flour and water.\n\nLet the dough rest overnight in the fridge before you bake it.\n",
    "workshop/saw.py": '"""Tools."""\n\n# The blade of the saw has to be sharpened once a year.\n',
}


def run(server: Server, **body: object) -> object:
    answer = server.client.post("/agent/run", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["result"]


def test_what_is_said_is_found_by_file_and_line(demo: Server, tmp_path: Path) -> None:
    for name, text in TEXTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "broken.txt").write_bytes(b"\xff\xfe\x00")
    indexed = run(demo, agent="index", input=str(tmp_path))
    assert isinstance(indexed, dict)
    assert (indexed["files"], indexed["passages"], indexed["unchanged"]) == (4, 7, 0)
    for question, place in (
        ("how much light do flowers need?", ("roses.md", 5)),
        ("when should I put bread into the oven?", ("bread.txt", 3)),
        ("how often must a blade be made sharp?", ("saw.py", 3)),
    ):
        found = run(demo, agent="where", message=question)
        assert isinstance(found, list)
        best = found[0]
        assert (Path(best["file"]).name, best["line"]) == place, question
        lines = Path(best["file"]).read_text().splitlines()
        assert best["quote"].splitlines()[0] == lines[best["line"] - 1]
    again = run(demo, agent="index", input=str(tmp_path))
    assert isinstance(again, dict)
    assert again["unchanged"] == 3, "nothing is embedded twice"


def test_a_folder_that_is_not_there_is_said(demo: Server) -> None:
    answer = demo.client.post("/agent/run", json={"agent": "index", "input": "/nowhere/at/all"})
    assert answer.status_code == 422
    assert "/nowhere/at/all" in answer.json()["error"]["message"]

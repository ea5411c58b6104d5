"""lay_out, against what huggingface_hub and transformers do, and formats.LayOut in Go with them."""

import json
import os
import unittest

from lorakit_plugin import LayoutOptions, Shard, Tensor, lay_out

GOLDENS = os.path.join(os.path.dirname(__file__), "../../../fixtures/layouts.json")


class Layouts(unittest.TestCase):
    def test_goldens(self):
        with open(GOLDENS, encoding="utf-8") as file:
            cases = json.load(file)
        self.assertTrue(cases)
        for number, case in enumerate(cases):
            with self.subTest(number):
                tensors = [Tensor(name, dtype, tuple(shape)) for name, dtype, shape in case["tensors"]]
                groups = case["options"]["groups"] or range(len(tensors))
                options = LayoutOptions(**case["options"] | {"groups": groups, "metadata": {}})
                found = []

                def shard(name, members, tensors=tensors, found=found):
                    found.append([name, list(members)])
                    places, at = {}, 0
                    for index in members:
                        places[index] = at
                        at += tensors[index].nbytes
                    return Shard(name, at, places)

                layout = lay_out(tensors, options, ".toy", shard)
                self.assertEqual(case["files"], found)
                self.assertEqual(case["files"], [[one.name, list(one.tensors)] for one in layout.shards])
                self.assertEqual(case["extras"], {extra.name: extra.data.decode() for extra in layout.extras})

    def test_stem(self):
        options = LayoutOptions(0, "", "", 0, {}, [])
        layout = lay_out([], options, ".toy", lambda name, members: Shard(name, 0, {}), stem="own")
        self.assertEqual(["own.toy"], [shard.name for shard in layout.shards])

    def test_what_cannot_be(self):
        tensor = Tensor("a", "U8", (1,))
        for tensors, options, text in [
            ([tensor, tensor], LayoutOptions(0, "", "", 0, {}, [0, 1]), "'a': found it twice"),
            ([tensor], LayoutOptions(0, "", "", 0, {}, [0, 1]), "2 groups for 1 tensors"),
            ([tensor], LayoutOptions(-1, "", "", 0, {}, [0]), "shard size of -1"),
        ]:
            with self.subTest(text), self.assertRaisesRegex(ValueError, text):
                lay_out(tensors, options, ".toy", lambda name, members: Shard(name, 1, {0: 0}))

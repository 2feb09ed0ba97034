"""The built-in world: generated images whose content is known exactly, to train on and to be asked about.

Scenes of coloured shapes, handwritten digits and rendered words come in two splits that cannot overlap, because the
split is a function of a scene's content. Captions and dialogues are drawn from the training split, the benchmark from
the other. Given the text of a question, every possible answer is equally likely, so a model that ignores the image
scores at chance in each skill.

`scene` and `sampling` say what is shown, `render` draws it, `questions` holds the skills, `language` captions and
dialogues, `scoring` reads a model's answer; `dataset` and `benchmark` put them behind the interfaces.
"""

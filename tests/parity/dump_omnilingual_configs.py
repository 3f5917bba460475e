"""Print the wav2vec 2.0 architectures of Omnilingual ASR as JSON: family → architecture → configuration.

Run it where omnilingual-asr 0.2.0 and fairseq2 are installed::

    python tests/parity/dump_omnilingual_configs.py > tests/parity/omnilingual_configs.json
"""

from __future__ import annotations

import json
import sys
from enum import Enum

from dump_fairseq2_configs import Recorder
from fairseq2.models.wav2vec2.asr.config import Wav2Vec2AsrConfig, register_wav2vec2_asr_configs
from fairseq2.models.wav2vec2.config import Wav2Vec2Config, register_wav2vec2_configs
from omnilingual_asr.models.wav2vec2_asr.config import register_omnilingual_asr_wav2vec2_asr_configs
from omnilingual_asr.models.wav2vec2_ssl.config import register_omnilingual_asr_wav2vec2_ssl_configs


def main() -> None:
    recorder = Recorder()
    register_wav2vec2_configs(recorder)
    register_wav2vec2_asr_configs(recorder)
    theirs = set(recorder.factories)
    register_omnilingual_asr_wav2vec2_ssl_configs(recorder)
    register_omnilingual_asr_wav2vec2_asr_configs(recorder)

    families = {
        family: {arch: config for arch, config in recorder.configs(kls).items() if (kls, arch) not in theirs}
        for family, kls in (("wav2vec2", Wav2Vec2Config), ("wav2vec2_asr", Wav2Vec2AsrConfig))
    }
    json.dump(families, sys.stdout, indent=1, default=lambda value: value.name if isinstance(value, Enum) else value)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()

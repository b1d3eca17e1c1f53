"""Speaks a sentence with Kokoro, its ALBERT on fused kernels, and writes speech-0.wav and so on.

    pip install kokoro soundfile
    python examples/kokoro_speech.py "A quiet, generous film."

`accelerate` finds the encoder inside of Kokoro's model; everything else of Kokoro runs as before.
"""

import sys

import albert_fast


def main() -> None:
    try:
        import soundfile
        from kokoro import KPipeline
    except ImportError as error:
        sys.exit(f"{error}: pip install kokoro soundfile")
    text = sys.argv[1] if len(sys.argv) > 1 else "A quiet, generous film."
    speech = KPipeline(lang_code="a", repo_id="hexgrad/Kokoro-82M")
    albert_fast.accelerate(speech.model)
    for number, (_, _, audio) in enumerate(speech(text, voice="af_heart")):
        name = f"speech-{number}.wav"
        soundfile.write(name, audio, 24000)
        print(name)


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:  # a missing file, an unsuitable model
        sys.exit(f"error: {error}")

"""LoRA adapters as PEFT stores them: to a lowrank vector (`importing`), and back (`exporting`)."""

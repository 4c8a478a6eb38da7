"""A small model from start to end: SmolLM2-135M learns to reason about audio on ReasonAQA.

Hardware: 1 x 24 GB. By tools/bench.py fit (--windows=3 --tokens=128 --answers=50 --items=968071), not
measured: 8.8 GB, 14.6 GB where all texts are long; 1.0 h a pass at 40 % of an RTX 4090's peak, three passes.
Data: train.json, val.json and test.json of ReasonAQA (zenodo.org/records/15036628; Mellow, arXiv
2503.08540), 968,071 questions on 155 h of AudioCaps and Clotho, whose sounds come from those;
prepare/datasets.py writes the manifests. Scores: python eval.py --split ReasonAQA-AQA/test
Launch: python train.py config/reason.py
"""
run_name = "reason"
lang_encoder_path = "HuggingFaceTB/SmolLM2-135M"  # or data/smollm2, of prepare/smollm2.py: Instruct, 4 bits
clap_checkpoint = "630k-audioset-best.pt"  # LAION's, huggingface.co/lukewys/laion_clap: HTSAT-tiny at 48 kHz
clap_embed_dim = 96
clap_depths = [2, 2, 6, 2]
max_num_window = 3  # Clotho's 30 s

dataset_blending_config = {"ReasonAQA-AQA/train": 1.0}
valid_dataset_config = {"ReasonAQA-AQA/val": 0.05}
dataset_blending_global_weight = 1.0
num_epochs = 3
batch_size = 16  # a larger batch of long texts would not fit
gradient_accumulation_steps = 8
max_tokens = 384  # Mellow's: 129 of the question, 250 of the answer

unfreeze_full_lm = True  # 135 M parameters know too little to reason when frozen; Mellow trains them too
learning_rate = 3e-4
gate_learning_rate = 1e-2  # the gates start at 0 and should open within the first thousand steps
lr_scheduler = "cosine"
warmup_steps = 500

"""CLIP pretraining on phantoms: model, loss, schedule and state. ``train`` is the command."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn

from ...export.clip import Clip, ClipSpec, TextSpec, reduce_tokens
from ...export.encoders.dcformer import DCFormer
from ...export.make_bundle import SIMILARITY_SCALE
from ...export.registry import get_encoder
from ...runtime.errors import InputError
from ...runtime.files import atomic_file
from ...runtime.manifest import CT_RATE_CLASSES, Preprocessing
from .captions import report_text, statements
from .quantizer import CodebookTrainer
from .reports import write_report
from .samples import BYTE_SCALE, VARIANTS, Sample
from .stem import calibrate_stem, centre_stages, run_stages, run_stem

ENCODER, REDUCTION = "dcformer-nano", "channel"
#: A field of view of 384 x 384 x 288 mm: the published 0.75 and 1.5 mm would show a quarter of the chest at this size.
PREPROCESSING = Preprocessing(shape_dhw=(128, 256, 256), spacing_hwd_mm=(1.5, 1.5, 2.25))
INPUT_SIZE = PREPROCESSING.shape_dhw[1]
CODEBOOK_SIZE = 1024
MAX_TOKENS = 384
#: At e the 18 statements could not all be near certain in one unit vector; ranks and the threshold 0.5 stay the same.
STATEMENT_SCALE = 8.0
STATEMENT_WEIGHT, COMMITMENT_WEIGHT = 3.0, 0.25
CHECKPOINT_NAME, STATE_NAME = "checkpoint.pth", "training_state.pt"


@dataclass(frozen=True)
class TrainOptions:
    """What fixes a training; ``patients`` are painted three times each with other findings."""

    patients: int
    steps: int
    batch_size: int
    seed: int
    learning_rate: float
    prevalence: float
    monitored_patients: int = 40
    warm_up: float = 0.05
    quantize_after: float = 0.25


@dataclass(frozen=True)
class Batch:
    """Taps ``[B, …, 19]`` uint8, labels ``[B, 18]`` float, token ids and mask ``[B, L]`` int64."""

    taps: Tensor
    labels: Tensor
    ids: Tensor
    mask: Tensor


class Texts:
    """Token ids of reports and prompts."""

    def __init__(self, vocabulary: Path) -> None:
        self._tokenizer = BertWordPieceTokenizer.from_file(str(vocabulary), lowercase=True)
        self._tokenizer.enable_padding()
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self.size = self._tokenizer.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask ``[n, L]`` int64."""
        rows = self._tokenizer.encode_batch(list(texts))
        return torch.tensor([row.ids for row in rows]), torch.tensor([row.attention_mask for row in rows])


class Batches:
    """Batches by step number: every epoch in another order, every report written anew."""

    def __init__(self, samples: Sequence[Sample], texts: Texts, options: TrainOptions) -> None:
        self._samples, self._texts, self._options = samples, texts, options

    def __call__(self, step: int) -> Batch:
        """The batch of one step; a function of the seed and the step alone."""
        size = self._options.batch_size
        per_epoch = len(self._samples) // size
        epoch, position = divmod(step, per_epoch)
        order = np.random.default_rng([self._options.seed, 1, epoch]).permutation(len(self._samples))
        rng = np.random.default_rng([self._options.seed, 2, step])
        return self.collate([self._samples[i] for i in order[position * size : (position + 1) * size]], rng)

    def collate(self, samples: Sequence[Sample], rng: np.random.Generator) -> Batch:
        """Some samples as a batch."""
        labels = np.array([[name in sample.present for name in CT_RATE_CLASSES] for sample in samples], np.float32)
        ids, mask = self._texts.encode([report_text(write_report(sample.present, rng)) for sample in samples])
        taps = torch.from_numpy(np.stack([sample.taps for sample in samples]))
        return Batch(taps, torch.from_numpy(labels), ids, mask)

    def stream(self, first: int, last: int) -> Iterator[tuple[int, Batch]]:
        """Steps and their batches; the next one is read while this one is used."""
        with ThreadPoolExecutor(1) as reader:
            following = reader.submit(self, first)
            for step in range(first, last):
                batch = following.result()
                if step + 1 < last:
                    following = reader.submit(self, step + 1)
                yield step, batch


def report_loss(images: Tensor, reports: Tensor) -> Tensor:
    """The original's loss: cross entropy of scans against reports and of reports against scans, ``[B, 512]`` each."""
    logits = SIMILARITY_SCALE * images @ reports.t()
    target = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def statement_loss(images: Tensor, prompts: Tensor, labels: Tensor) -> Tensor:
    """Every scan ``[B, 512]`` against the two prompts of each finding ``[18, 2, 512]``, and each prompt against scans.

    A prompt is true of several scans of a batch; it is to be equally near to all of them.
    """
    logits = STATEMENT_SCALE * torch.einsum("bd,fpd->bfp", images, prompts)
    is_true = torch.stack([labels, 1 - labels], dim=-1)
    scan_to_prompt = -(logits.log_softmax(dim=-1) * is_true).sum(dim=-1).mean()
    per_prompt = -(logits.log_softmax(dim=0) * is_true).sum(dim=0) / is_true.sum(dim=0).clamp(min=1)
    chance = is_true.sum(dim=0).clamp(min=1).log()  # what is left when all true scans are equally near
    prompt_to_scan = (per_prompt - chance).mean()
    return (scan_to_prompt + prompt_to_scan) / 2


class Trainer:
    """One training run in a folder."""

    def __init__(self, out: Path, samples: Sequence[Sample], monitored: Sequence[Sample], options: TrainOptions,
                 device: str) -> None:
        torch.manual_seed(options.seed)
        self.out, self.options, self.device = out, options, torch.device(device)
        self.texts = Texts(out / "tokenizer" / "vocab.txt")
        self.batches = Batches(samples, self.texts, options)
        self.monitored = monitored
        text = TextSpec(self.texts.size, hidden_size=128, layers=2, intermediate_size=512, max_positions=MAX_TOKENS,
                        token_types=2)
        spec = ClipSpec(get_encoder(ENCODER), REDUCTION, INPUT_SIZE, CODEBOOK_SIZE, text)
        model = spec.build()
        assert isinstance(model, Clip)  # the spec has no detector classes
        self.model = model.to(self.device)
        self.generator = torch.Generator().manual_seed(options.seed)
        encoder = model.visual_transformer.encoder
        assert isinstance(encoder, DCFormer)
        self.encoder, self.book = encoder, model.visual_transformer.vq.codebook
        self.codebook = CodebookTrainer(self.book, self.generator)
        self.optimizer = torch.optim.AdamW(_parameter_groups(model), lr=options.learning_rate, betas=(0.9, 0.98))
        self.step = 0
        self.amp = _mixed_precision(self.device)
        self.prompt_ids = tuple(t.to(self.device) for t in self.texts.encode(statements()))

    @property
    def initted(self) -> Tensor:
        """Whether the codebook has begun (``[1]``, saved with the model as the original does)."""
        return self.book.get_buffer("initted")

    # ------------------------------------------------------------------ forward

    def tokens(self, taps: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Tokens ``[B, D'H'W', C]`` float32 and their grid (D', H', W')."""
        scaled = taps.to(self.device).to(torch.bfloat16 if self.amp else torch.float32) / BYTE_SCALE - 1
        features = run_stages(self.encoder, run_stem(self.encoder, scaled))
        tokens = features.float().permute(0, 4, 2, 3, 1)
        return tokens.flatten(1, 3), tuple(tokens.shape[1:4])

    def project(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Unit embeddings ``[B, 512]`` of quantized tokens."""
        reduced = reduce_tokens(tokens.unflatten(1, grid), self.model.reduction)
        return F.normalize(self.model.to_visual_latent(reduced).float(), dim=-1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss by name; their sum is minimised."""
        quantizes = self.step >= self.options.quantize_after * self.options.steps
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            tokens, grid = self.tokens(batch.taps)
            reports = self.model.encode_text(batch.ids.to(self.device), batch.mask.to(self.device))
            prompts = self.model.encode_text(*self.prompt_ids)
        terms: dict[str, Tensor] = {}
        if quantizes:
            if not self.initted.item():
                self.codebook.start(tokens.detach().flatten(0, 1))
                self.initted.fill_(1)
            quantized = self.codebook(tokens)
            unit = quantized.tokens
            terms["commitment"] = COMMITMENT_WEIGHT * quantized.commitment
        else:
            unit = F.normalize(tokens, dim=-1)
        images = self.project(unit, grid)
        terms["report"] = report_loss(images, reports.float())
        statement = statement_loss(images, prompts.float().unflatten(0, (-1, 2)), batch.labels.to(self.device))
        terms["statement"] = STATEMENT_WEIGHT * statement
        return terms

    # ------------------------------------------------------------------ the run

    @torch.no_grad()
    def start(self) -> None:
        """Fit the random weights to the data: statistics of the stem's norms, and no part common to all embeddings.

        What all scans (or all texts) share is projected out of the latent layers: it would make all embeddings alike.
        """
        self.initted.fill_(0)
        self.model.train()
        batches = [self.batches(number) for number in range(4)]
        taps = torch.cat([batch.taps for batch in batches])[:24].to(self.device)
        scaled = taps.float() / BYTE_SCALE - 1
        calibrate_stem(self.encoder, scaled[:8])
        features = centre_stages(self.encoder, run_stem(self.encoder, scaled))
        tokens = F.normalize(features.permute(0, 4, 2, 3, 1), dim=-1)
        _project_out(self.model.to_visual_latent, reduce_tokens(tokens, self.model.reduction).mean(dim=0))
        self.model.eval()
        hidden = [self.model.text_transformer(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
                  .last_hidden_state[:, 0] for ids, mask in (self.prompt_ids, *((b.ids, b.mask) for b in batches))]
        _project_out(self.model.to_text_latent, torch.cat(hidden).mean(dim=0))

    def run(self, on_step: Callable[[int, dict[str, float]], None], save_every_s: float = 300) -> None:
        """Train to the last step; the state is saved every few minutes and at the end."""
        if self.step == 0:
            self.start()
        saved = time.monotonic()
        for _, batch in self.batches.stream(self.step, self.options.steps):
            self.model.train()
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate()
            terms = self.loss(batch)
            self.optimizer.zero_grad(set_to_none=True)
            sum(terms.values(), torch.zeros((), device=self.device)).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            on_step(self.step, {name: float(term.detach()) for name, term in terms.items()})
            if time.monotonic() - saved > save_every_s:
                self.save_state()
                saved = time.monotonic()
        self.save_state()

    def _learning_rate(self) -> float:
        """Linear warm-up, then half a cosine down to one percent."""
        progress = self.step / self.options.steps
        if progress < self.options.warm_up:
            return self.options.learning_rate * (progress + 1 / self.options.steps) / self.options.warm_up
        turn = (progress - self.options.warm_up) / (1 - self.options.warm_up)
        return self.options.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * turn)) / 2)

    @torch.no_grad()
    def monitor(self) -> dict[str, float]:
        """Zero-shot AUROC by finding on scans that are not trained on, with quantized tokens once there is a codebook.

        A finding that all or none of the scans have is left out.
        """
        self.model.eval()
        rng = np.random.default_rng(0)
        margins, labels = [], []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            prompts = self.model.encode_text(*self.prompt_ids).float().unflatten(0, (-1, 2))
        for start in range(0, len(self.monitored), self.options.batch_size):
            batch = self.batches.collate(self.monitored[start : start + self.options.batch_size], rng)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                tokens, grid = self.tokens(batch.taps)
            unit = F.normalize(tokens, dim=-1)
            if self.initted.item():
                unit = F.embedding(self.book(tokens), self.book.embed[0])
            margins.append(self.project(unit, grid) @ (prompts[:, 0] - prompts[:, 1]).t())
            labels.append(batch.labels)
        margin, label = torch.cat(margins).cpu().numpy(), torch.cat(labels).numpy()
        return {name: float(roc_auc_score(label[:, i], margin[:, i])) for i, name in enumerate(CT_RATE_CLASSES)
                if 0 < label[:, i].sum() < len(label)}

    # ------------------------------------------------------------------ files

    def save_state(self) -> None:
        """Everything needed to go on."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
                 "generator": self.generator.get_state(), "torch_rng": torch.get_rng_state(),
                 "options": asdict(self.options)}
        with atomic_file(self.out / STATE_NAME) as path:
            torch.save(state, path)

    def load_state(self) -> None:
        """Go on from a saved state.

        Raises:
            InputError: the state belongs to a training with other options.
        """
        path = self.out / STATE_NAME
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name, value in asdict(self.options).items():
            if state["options"].get(name) != value:
                raise InputError(f"{path}: was trained with {name} {state['options'].get(name)}, not {value}; choose "
                                 "another --out")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["torch_rng"].cpu())
        self.step = int(state["step"])

    def save_checkpoint(self) -> None:
        """The original format, without the optimizer's state, which is twice the size of the model."""
        arguments = argparse.Namespace(model=get_encoder(ENCODER).checkpoint_name, reduction=REDUCTION,
                                       input_size=INPUT_SIZE, spacing_hwd_mm=list(PREPROCESSING.spacing_hwd_mm))
        epoch = self.step * self.options.batch_size // (self.options.patients * VARIANTS)
        with atomic_file(self.out / CHECKPOINT_NAME) as path:
            torch.save({"model": self.model.cpu().state_dict(), "epoch": epoch, "args": arguments}, path)


def _project_out(layer: nn.Linear, direction: Tensor) -> None:
    """Make a layer blind to one direction of its input."""
    unit = F.normalize(direction, dim=0)
    layer.weight -= torch.outer(layer.weight @ unit, unit)


def _parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """Weight decay for matrices and kernels, none for biases, norms and scales."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]


def _mixed_precision(device: torch.device) -> bool:
    """Whether bfloat16 is fast here: on CPUs only with units for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

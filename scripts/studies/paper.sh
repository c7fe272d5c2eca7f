#!/usr/bin/env bash
# The paper's CIFAR-10 figures as comparisons, at full length (days on a GPU):
#   scripts/studies/paper.sh DATA [more options of compare]
# DATA: a folder or a hub name, such as uoft-cs/cifar10. Each learning rate is the one that the
# paper found best for ordinary training of that length. Every command goes on where it stopped.
set -euo pipefail
data=$1
compare() { python -m tract_hub compare --data "$data" "${@}"; }
options=("${@:2}")

# Figure 3: ResNet-18 by SGD and by Adam, by length of training.
compare --recipe cifar-resnet18 --epochs 100 200 400 800 --lam 0.1 0.05 0.2 "${options[@]}"
for length in "100 200 0.01" "400 800 0.001"; do
  read -r short long lr <<<"$length"
  compare --recipe cifar-resnet18 --optimizer adam --weight-decay 0 --epochs "$short" "$long" \
    --lr "$lr" --lam 0.1 0.05 0.2 "${options[@]}"
done
# Figure 4: the ViT, by length of training.
for length in "100 0.001" "200 0.000631" "400 0.000316" "800 0.000316"; do
  read -r epochs lr <<<"$length"
  compare --recipe cifar-vit --epochs "$epochs" --lr "$lr" --lam 0.1 0.05 0.2 "${options[@]}"
done
# Figure 6: λ.
compare --recipe cifar-resnet18 --epochs 200 --lam 0.1 0.0125 0.05 0.2 0.8 "${options[@]}"
# Figure 8: pixels that are not standardised.
for pixels in unit bytes; do
  compare --recipe cifar-resnet18 --epochs 200 --pixels "$pixels" --damping absolute relative \
    "${options[@]}"
done

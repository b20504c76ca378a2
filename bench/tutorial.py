"""The loop of PyTorch's CIFAR-10 tutorial, rewritten; compare.py compares train.py with it.

DataLoader with two workers, images decoded and transformed one by one, torch.optim's class, and the
loss read at every step: https://docs.pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html
It prints as train.py does, and reports short epochs, too.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    data_dir = train.parse_args([]).data_dir
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]
    )
    training_set, test_set = (
        CIFAR10(data_dir, is_training, download=True, transform=transform)
        for is_training in (True, False)
    )
    loader = DataLoader(training_set, args.batch_size, shuffle=True, num_workers=2)
    test_loader = DataLoader(test_set, args.batch_size, num_workers=2)

    net = train.Net().to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    window = min(2000, len(loader))
    for epoch in range(args.epochs):
        running_loss = 0.0
        for i, data in enumerate(loader):
            inputs, labels = data[0].to(device), data[1].to(device)
            optimizer.zero_grad()
            loss = criterion(net(inputs), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            if i % window == window - 1:
                print(f"[{epoch + 1}, {i + 1:5d}] loss: {running_loss / window:.3f}", flush=True)
                running_loss = 0.0

    correct = 0
    with torch.no_grad():
        for images, labels in test_loader:
            predicted = net(images.to(device)).argmax(1)
            correct += (predicted == labels.to(device)).sum().item()
    print(f"Acc: {100 * correct / len(test_set):.3f}% ({correct}/{len(test_set)})")


if __name__ == "__main__":
    main()

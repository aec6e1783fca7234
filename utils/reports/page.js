for (const pair of document.querySelectorAll(".pair")) {
  const slider = document.createElement("input");
  slider.type = "range"; slider.min = 0; slider.max = 100; slider.value = 50;
  slider.setAttribute("aria-label", "how much of the picture before training is shown");
  slider.addEventListener("input", () => pair.style.setProperty("--cut", slider.value + "%"));
  pair.classList.add("laid");
  pair.after(slider);
}

// The theme's Font Awesome replaces <i> by <svg>, after which ipywidgets' Play button cannot set its class and every
// linked widget dies. Nesting the drawing inside the <i> keeps both alive, whichever script comes first; and once the
// page is loaded nothing more is drawn, or each step of a Play button would add another icon to it.
const icons = { autoReplaceSvg: "nest", observeMutations: false };
window.FontAwesomeConfig = icons;
if (window.FontAwesome) Object.assign(window.FontAwesome.config, icons);

// ipywidgets typesets through MathJax 2's queue; hand its jobs to the MathJax 3 that is here.
window.addEventListener("load", () => {
  const mathjax = (window.MathJax ??= {});
  mathjax.Hub ??= { Queue: ([, , element]) => mathjax.typesetPromise?.([element]) };
});

// Widgets name their controls in a sibling label; say the same name to screen readers.
function nameControls(root) {
  for (const row of root.querySelectorAll(".widget-inline-hbox, .widget-dropdown")) {
    const words = row.querySelector(".widget-label")?.textContent.trim();
    if (!words) continue;
    const value = row.querySelector(".widget-readout")?.textContent.trim();
    for (const control of row.querySelectorAll(".noUi-handle, select")) {
      control.setAttribute("aria-label", words);
      if (value) control.setAttribute("aria-valuetext", value);
    }
  }
  const titles = { "fa-play": "Play", "fa-pause": "Pause", "fa-stop": "Stop", "fa-retweet": "Repeat" };
  for (const button of root.querySelectorAll(".widget-play button")) {
    for (const [icon, title] of Object.entries(titles)) {
      if (button.querySelector("." + icon)) button.setAttribute("aria-label", title);
    }
  }
}

document.addEventListener("DOMContentLoaded", () => {
  let waiting = false;
  new MutationObserver(() => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; nameControls(document); });
  }).observe(document.body, { childList: true, subtree: true, characterData: true });
  nameControls(document);
  // Sphinx calls bibliographies lists, but their entries are not list items.
  for (const list of document.querySelectorAll(".citation-list")) list.removeAttribute("role");
});

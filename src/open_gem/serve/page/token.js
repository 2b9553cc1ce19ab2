// The dialog that asks for the server's token.
let asking = null;

/** A promise of the token; one dialog, however many requests wait for it. `wrong` is whether one was refused. */
export function askToken(wrong) {
  const dialog = document.getElementById("token"), field = dialog.querySelector("input");
  dialog.querySelector(".wrong").hidden = !wrong;
  asking ??= new Promise((resolve) => {
    field.value = "";
    dialog.showModal();
    dialog.addEventListener("close", () => ((asking = null), resolve(field.value)), { once: true });
  });
  return asking;
}
